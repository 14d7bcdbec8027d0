"""The step of a sequential head: distributions, draws strictly according to them, edge cases."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from decoding_world import g_test
from kernels_driver import Case, argmax, draw, in_a_process
from torch import Tensor

from deepspec.kernels.inversion import sample

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

BELOW_ONE = 1 - 2.0**-53
NEARNESS = 1e-13  # of a uniform to a boundary between two tokens; float64 sums are exact to about 1e-16
Inputs = dict[str, Any]


def random_inputs(rows: int, vocab: int, rank: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Every third row greedy, the others of temperatures from 0.2 to 1.7, the first of 0.2."""
    generator = torch.Generator().manual_seed(1000 * seed + rows + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    temperatures = 0.2 + 1.5 * torch.rand(rows, generator=generator)
    temperatures[:1] = 0.2
    temperatures[2::3] = 0
    return {
        "base": (2 * normal(rows, vocab)).to(dtype),
        "latents": normal(rows, rank).to(dtype),
        "markov_w2": normal(vocab, rank).to(dtype),
        "temperatures": temperatures,
        "uniform": torch.rand(rows, generator=generator, dtype=torch.float64),
    }


def strided() -> Inputs:
    """One slot of a block's logits, and of a buffer for its distributions, uniforms of a column."""
    inputs, slots, slot = random_inputs(4, 70), 3, 1
    base, out = torch.full((4, slots, 70), torch.nan), torch.full((4, slots, 70), -1.0)
    base[:, slot] = inputs["base"]
    latents, uniform = torch.zeros(4, slots, 5), torch.zeros(4, slots, dtype=torch.float64)
    latents[:, slot], uniform[:, slot] = inputs["latents"], inputs["uniform"]
    views = {"base": base, "latents": latents, "uniform": uniform, "out": out}
    return inputs | {name: tensor[:, slot] for name, tensor in views.items()}


def first_rows(inputs: Inputs, rows: int) -> Inputs:
    return inputs | {name: inputs[name][:rows] for name in ("base", "latents", "temperatures", "uniform")}


def equal_chances(vocab: int, possible: list[int], uniform: list[float]) -> Inputs:
    """Rows that give each of the possible tokens, a power of two of them, exactly the same probability."""
    rows = len(uniform)
    base = torch.full((rows, vocab), -torch.inf)
    base[:, possible] = 3.0
    return {
        "base": base,
        "latents": torch.zeros(rows, 2),
        "markov_w2": torch.zeros(vocab, 2),
        "temperatures": torch.ones(rows),
        "uniform": torch.tensor(uniform, dtype=torch.float64),
    }


CHUNK = 4096
POSSIBLE = [3, 4, 700, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 9000]  # across three chunks, never the first or last
EXACT = equal_chances(
    9011,
    POSSIBLE,
    [uniform for step in range(8) for uniform in (step / 8, (step + 1) / 8 - 2.0**-50, step / 8 + 2.0**-50)]
    + [BELOW_ONE],
)
EXACT_TOKENS = [token for token in POSSIBLE for _ in range(3)] + [POSSIBLE[-1]]


def not_finite() -> Inputs:
    """Pairs of a sampled and a greedy row: a NaN, nothing but NaN, infinity, no possible token, and a good pair."""
    inputs = random_inputs(10, 300)
    inputs["temperatures"] = torch.tensor([1.0, 0.0] * 5)
    base = inputs["base"]
    base[0:2, 17] = torch.nan
    base[2:4] = torch.nan
    base[4:6, 200] = torch.inf
    base[6:8] = -torch.inf
    return inputs


def ties() -> Inputs:
    """Greedy rows whose largest logit occurs several times, also in other blocks of the vocabulary."""
    inputs = random_inputs(3, 5000)
    inputs["temperatures"] = torch.zeros(3)
    inputs["latents"] = torch.zeros(3, 5)
    for row, places in enumerate(([4990, 70], [1, 2], [4500, 4097, 4096])):
        inputs["base"][row, places] = 50.0
    return inputs


CASES: dict[str, Inputs] = {
    "one row": random_inputs(1, 61),
    "one block": random_inputs(3, 256, 16),
    "odd sizes": random_inputs(5, 9001, 7),
    "several tiles of rows": random_inputs(19, 130),
    "one token": random_inputs(3, 1),
    "no rows": random_inputs(0, 30),
    "bf16": random_inputs(6, 700, 16, torch.bfloat16),
    "float16": random_inputs(6, 700, 16, torch.float16),
    "bf16 W2 only": random_inputs(3, 90) | {"markov_w2": random_inputs(3, 90)["markov_w2"].bfloat16()},
    "strided": strided(),
    "ties": ties(),
    "not finite": not_finite(),
    "exact": EXACT,
    "high temperature": random_inputs(3, 90) | {"temperatures": torch.full((3,), 1e6)},
    "low temperature": random_inputs(3, 90) | {"temperatures": torch.full((3,), 1e-30)},
}
FINITE = [name for name in CASES if name not in ("not finite", "no rows")]
G_ROWS, G_VOCAB = 600, 11


def repeated(rows: int) -> Inputs:
    """One distribution, many uniforms."""
    one = random_inputs(1, G_VOCAB, 3, seed=2) | {"temperatures": torch.tensor([0.8])}
    many = {name: one[name].repeat(rows, *[1] * (one[name].ndim - 1)) for name in one if name != "markov_w2"}
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return one | many | {"uniform": uniform}


def reference(inputs: Inputs) -> Tensor:
    """The distribution in float64."""
    logits = inputs["base"].double() + inputs["latents"].double() @ inputs["markov_w2"].double().T
    rows = []
    for row, temperature in zip(logits, inputs["temperatures"].double(), strict=True):
        one_hot = torch.zeros_like(row)
        one_hot[row.argmax()] = 1
        rows.append(torch.softmax(row / temperature, -1) if temperature else one_hot)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    cases: dict[str, Case] = {name: ("draw", inputs) for name, inputs in CASES.items()}
    for name in ("odd sizes", "several tiles of rows", "bf16"):
        cases[f"near, {name}"] = ("draw_near", CASES[name] | {"nearness": NEARNESS})
        cases[f"first rows, {name}"] = ("draw", first_rows(CASES[name], 2))
    for name in ("odd sizes", "ties", "bf16", "no rows", "not finite"):
        cases[f"argmax, {name}"] = ("argmax", logits_of(CASES[name]))
    cases["g-test"] = ("draw", repeated(G_ROWS))
    return in_a_process("interpret", cases, tmp_path_factory.mktemp("biased_sampling"))


def logits_of(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in ("base", "latents", "markov_w2")}


def drawn(name: str, implementation: str, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    if implementation == "triton":
        return request.getfixturevalue("interpreted")[name]
    return draw("plain", **(repeated(G_ROWS) if name == "g-test" else CASES[name]))


both = pytest.mark.parametrize("implementation", ["plain", pytest.param("triton", marks=needs_triton)])


@both
@pytest.mark.parametrize("name", FINITE)
def test_the_distribution_is_the_softmax(name, implementation, request):
    tokens, distribution = drawn(name, implementation, request)
    assert distribution.dtype == torch.float32
    assert tokens.dtype == torch.long
    torch.testing.assert_close(distribution.double(), reference(CASES[name]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(distribution.double().sum(-1), torch.ones(len(tokens)).double(), rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("name", FINITE)
def test_tokens_are_drawn_from_the_returned_distribution(name, implementation, request):
    tokens, distribution = drawn(name, implementation, request)
    assert torch.equal(tokens, sample(distribution, CASES[name]["uniform"]))


@needs_triton
@pytest.mark.parametrize("name", ["odd sizes", "several tiles of rows", "bf16"])
def test_uniforms_next_to_a_boundary(name, interpreted):
    distribution, below, drawn_below, above, drawn_above = interpreted[f"near, {name}"]
    assert torch.equal(drawn_below, sample(distribution, below))
    assert torch.equal(drawn_above, sample(distribution, above))
    assert (drawn_below < drawn_above).sum() >= len(below) / 2  # the others are greedy or first tokens


@both
def test_uniforms_on_a_boundary(implementation, request):
    """Where every number is exact, the boundary belongs to the token after it; impossible ones are never drawn."""
    tokens, distribution = drawn("exact", implementation, request)
    assert distribution[:, POSSIBLE].eq(1 / 8).all()
    assert tokens.tolist() == EXACT_TOKENS


@both
def test_greedy_rows_take_the_first_largest_logit(implementation, request):
    tokens, distribution = drawn("ties", implementation, request)
    assert tokens.tolist() == [70, 1, 4096]
    assert torch.equal(distribution, torch.nn.functional.one_hot(tokens, 5000).float())


@both
@pytest.mark.parametrize("name", ["odd sizes", "ties", "bf16", "no rows"])
def test_all_rows_greedy(name, implementation, request):
    inputs = logits_of(CASES[name])
    [ours] = (
        request.getfixturevalue("interpreted")[f"argmax, {name}"]
        if implementation == "triton"
        else argmax("plain", **inputs)
    )
    assert ours.dtype == torch.long
    logits = inputs["base"].double() + inputs["latents"].double() @ inputs["markov_w2"].double().T
    assert torch.equal(ours, logits.argmax(-1))


@both
def test_a_slot_of_larger_tensors(implementation, request):
    """The distribution lands in its slot of the buffer and nowhere else."""
    _, distribution = drawn("strided", implementation, request)
    buffer = torch.as_strided(distribution, (4, 3, 70), (210, 70, 1), 0)
    assert buffer[:, 0].eq(-1).all()
    assert buffer[:, 2].eq(-1).all()
    torch.testing.assert_close(buffer[:, 1].double(), reference(strided()), rtol=1e-4, atol=1e-7)


@both
def test_rows_that_are_not_finite_spoil_no_other(implementation, request):
    tokens, distribution = drawn("not finite", implementation, request)
    assert ((tokens >= 0) & (tokens < 300)).all()
    assert distribution[[0, 2, 4, 6]].isnan().any(-1).all()
    torch.testing.assert_close(distribution[8:].double(), reference(not_finite())[8:], rtol=1e-4, atol=1e-7)
    assert torch.equal(tokens[8:], sample(distribution, CASES["not finite"]["uniform"])[8:])


@needs_triton
def test_argmax_of_rows_that_are_not_finite(interpreted):
    [tokens] = interpreted["argmax, not finite"]
    assert ((tokens >= 0) & (tokens < 300)).all()


@both
def test_no_rows(implementation, request):
    tokens, distribution = drawn("no rows", implementation, request)
    assert (tokens.shape, distribution.shape) == ((0,), (0, 30))


@needs_triton
@pytest.mark.parametrize("name", ["odd sizes", "several tiles of rows", "bf16"])
def test_a_row_does_not_depend_on_the_others(name, interpreted):
    for alone, together in zip(interpreted[f"first rows, {name}"], interpreted[name], strict=True):
        assert torch.equal(alone, together[:2])


@both
def test_draws_follow_the_distribution(implementation, request):
    tokens, _ = drawn("g-test", implementation, request)
    one = repeated(1)
    assert g_test(tokens, reference(one)) > 1e-3
    assert g_test(tokens, reference(one | {"temperatures": torch.tensor([0.4])})) < 1e-6


def full_size(dtype: torch.dtype, rows: int = 5) -> Inputs:
    return random_inputs(rows, 151_936, 256, dtype)


@needs_triton
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """At full size, for the smallest shared memory of today's GPUs; W2 is read by one launch only."""
    cases: dict[str, Case] = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = full_size(dtype)
        cases |= {f"draw {dtype}": ("draw", inputs), f"argmax {dtype}": ("argmax", logits_of(inputs))}
    launches = in_a_process("compile", cases, tmp_path)
    names = ["_logits_of_block", "_normalise", "_draw", "_logits_of_block", "_argmax"]
    assert [name for name, _ in launches] == 2 * names
    assert {grid[1:] for name, grid in launches if name == "_logits_of_block"} == {(1, 1)}


def on_gpu(inputs: Inputs) -> Inputs:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", FINITE)
def test_on_a_gpu(name):
    tokens, distribution = (result.cpu() for result in draw(None, **on_gpu(CASES[name])))
    torch.testing.assert_close(distribution.double(), reference(CASES[name]), rtol=1e-4, atol=1e-6)
    assert torch.equal(tokens, sample(distribution, CASES[name]["uniform"]))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_at_full_size_in_a_cuda_graph(rows, dtype):
    first, second = on_gpu(full_size(dtype, rows)), on_gpu(random_inputs(rows, 151_936, 256, dtype, seed=1))
    draw("triton", **first)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        tokens, distribution = draw("triton", **first)
    for name, value in second.items():
        first[name].copy_(value)
    graph.replay()
    _, plain = draw("plain", **second)
    torch.testing.assert_close(distribution, plain, rtol=1e-3, atol=1e-6)
    assert torch.equal(tokens, sample(distribution, second["uniform"]))
    again, alone = draw("triton", **second), draw("triton", **first_rows(second, 1))
    assert torch.equal(again[1], distribution)
    assert torch.equal(alone[1], distribution[:1])


@pytest.mark.gpu
@needs_triton
def test_draws_on_a_gpu_follow_the_distribution():
    tokens, _ = draw("triton", **on_gpu(repeated(400_000)))
    assert g_test(tokens.cpu(), reference(repeated(1))) > 1e-3
