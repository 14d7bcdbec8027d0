"""Appending to key/value caches: what is written where, and that nothing else is."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from kernels_driver import Case, append, in_a_process
from torch import Tensor

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

SLOTS, COLUMNS = 5, 9
CACHES = ("keys_cache", "values_cache")
PLACES = [(0, 0), (4, 8), (2, 3), (2, 4), (3, -1), (1, 9), (0, 8), (1, 2**31), (9, -1)]  # some outside the cache


def random_case(heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float32, places=PLACES) -> dict:
    generator = torch.Generator().manual_seed(heads + head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    slots, positions = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
    return {
        "keys_cache": normal(SLOTS, heads, COLUMNS, head_dim),
        "values_cache": normal(SLOTS, heads, COLUMNS, head_dim),
        "keys": normal(len(places), heads, head_dim),
        "values": normal(len(places), heads, head_dim),
        "slots": slots,
        "positions": positions,
    }


def as_transformers_hands_them() -> dict:
    case = random_case(3, 12)
    states = {name: case[name].transpose(0, 1).contiguous()[None] for name in ("keys", "values")}
    return case | {name: state[0].transpose(0, 1) for name, state in states.items()}


def of_a_larger_cache() -> dict:
    """Columns and slots that are a part of a cache, keys and values a part of one projection."""
    case = random_case(2, 8)
    wide = torch.cat([case["keys"], case["values"]], dim=1)
    larger = {name: torch.zeros(SLOTS + 2, 2, 2 * COLUMNS, 8) for name in ("keys_cache", "values_cache")}
    return case | {
        "keys_cache": larger["keys_cache"][1:-1, :, 4 : 4 + COLUMNS],
        "values_cache": larger["values_cache"][1:-1, :, 4 : 4 + COLUMNS],
        "keys": wide[:, :2],
        "values": wide[:, 2:],
    }


def in_small_integers() -> dict:
    case = random_case(places=[place for place in PLACES if place[1] < 2**31])
    return case | {"slots": case["slots"].int(), "positions": case["positions"].int()}


CASES = {
    "plain": random_case(),
    "odd sizes": random_case(3, 12),
    "one head": random_case(1, 1),
    "bf16": random_case(dtype=torch.bfloat16),
    "one token": random_case(places=[(3, 5)]),
    "padding only": random_case(places=[(0, -1), (4, -1)]),
    "no tokens": random_case(places=[]),
    "transposed": as_transformers_hands_them(),
    "part of a cache": of_a_larger_cache(),
    "int32": in_small_integers(),
}


def expected(case: dict) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    caches = case["keys_cache"].clone(), case["values_cache"].clone()
    for token, (slot, position) in enumerate(zip(case["slots"].tolist(), case["positions"].tolist(), strict=True)):
        if 0 <= position < COLUMNS:
            for cache, new in zip(caches, (case["keys"], case["values"]), strict=True):
                cache[slot, :, position] = new[token]
    return caches


def copied(case: dict) -> dict:
    """With caches of the same strides that may be written."""
    return case | {
        name: torch.empty_strided(case[name].shape, case[name].stride(), dtype=case[name].dtype).copy_(case[name])
        for name in ("keys_cache", "values_cache")
    }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    cases: dict[str, Case] = {name: ("append", copied(case)) for name, case in CASES.items()}
    return in_a_process("interpret", cases, tmp_path_factory.mktemp("key_values"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["plain", pytest.param("triton", marks=needs_triton)])
def test_new_tokens_are_written_and_nothing_else(name, implementation, request):
    before, after = CASES[name], expected(CASES[name])
    if implementation == "triton":
        written = request.getfixturevalue("interpreted")[name]
    else:
        written = append("plain", **copied(before))
    assert all(torch.equal(ours, right) for ours, right in zip(written, after, strict=True))
    changed = any(not torch.equal(ours, before[which]) for ours, which in zip(after, CACHES, strict=True))
    assert changed == (name not in ("padding only", "no tokens"))


def test_a_larger_cache_keeps_what_is_around_the_part():
    case = of_a_larger_cache()
    whole = case["keys_cache"]._base
    append("plain", **case)
    case["keys_cache"].zero_()
    assert not whole.any()


def test_an_implementation_that_does_not_exist():
    with pytest.raises(ValueError, match="implementation=chunked: must be one of plain, triton"):
        append("chunked", **copied(CASES["plain"]))


def test_on_the_cpu_the_plain_one_is_the_default():
    case = copied(CASES["plain"])
    append(None, **case)
    assert torch.equal(case["keys_cache"], expected(CASES["plain"])[0])


@needs_triton
def test_the_kernel_compiles_for_a_gpu(tmp_path):
    cases: dict[str, Case] = {
        str(dtype): ("append", random_case(8, 128, dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    launches = in_a_process("compile", cases, tmp_path)
    assert launches == [("_append", (len(PLACES), 1, 1))] * 3


@pytest.mark.gpu
@needs_triton
def test_in_a_cuda_graph():
    """The graph appends what the tensors hold when it is replayed, without waiting for the GPU."""
    first, second = random_case(8, 128), random_case(8, 128, places=PLACES[::-1])
    case = {name: tensor.cuda() for name, tensor in first.items()}
    append(None, **case)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        append(None, **case)
    for name, tensor in second.items():
        case[name].copy_(tensor)
    graph.replay()
    for name, right in zip(CACHES, expected(second), strict=True):
        assert torch.equal(case[name].cpu(), right)
