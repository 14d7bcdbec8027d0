"""Rejection sampling from logits: the rules at exact boundaries, packed rows, what must not be read, edge cases."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from decoding_world import g_test
from kernels_driver import Case, in_a_process, verify
from torch import Tensor

from deepspec.decoding.verification import VERIFICATION_RULES
from deepspec.kernels.inversion import distribution_of, sample
from deepspec.kernels.rejection import RULES

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
both = pytest.mark.parametrize("implementation", ["plain", pytest.param("triton", marks=needs_triton)])
of_rules = pytest.mark.parametrize("rule", RULES)

BELOW_ONE = 1 - 2.0**-53
LITTLE = 2.0**-50
Inputs = dict[str, Any]


def random_inputs(
    rows: int, slots: int, vocab: int, dtype: torch.dtype = torch.float32, *, cut: bool = False, likeness: float = 0.7
) -> Inputs:
    """Drafts like the target; every third row greedy; with `cut`, proposals of all lengths. No offsets."""
    generator = torch.Generator().manual_seed(rows + 10 * slots + 100 * vocab)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    logits = (1.5 * torch.randn(rows, slots + 1, vocab, generator=generator)).to(dtype)
    temperatures = 0.5 + uniform(rows).float()
    temperatures[1::3] = 0
    noise = likeness * torch.randn(rows, slots, vocab, generator=generator)
    draft = distribution_of(logits[:, :slots] + noise, temperatures)
    return {
        "tokens": sample(draft, uniform(rows, slots)),
        "draft": draft,
        "target_logits": logits.flatten(0, 1),
        "temperatures": temperatures,
        "lengths": torch.randint(0, slots + 1, (rows,), generator=generator) if cut else None,
        "accept_uniform": uniform(rows, slots),
        "next_uniform": uniform(rows),
        "offsets": None,
    }


def packed(inputs: Inputs) -> Inputs:
    """The same rows without padding, in reverse order; a position that nobody may read between any two of them."""
    rows, slots = inputs["tokens"].shape
    lengths = torch.full((rows,), slots) if inputs["lengths"] is None else inputs["lengths"]
    of_rows = inputs["target_logits"].unflatten(0, (rows, slots + 1))
    gap, parts, offsets, position = torch.full_like(of_rows[0, :1], torch.nan), [], [0] * rows, 0
    for row in reversed(range(rows)):
        offsets[row] = position + 1
        parts += [gap, of_rows[row, : lengths[row] + 1]]
        position += int(lengths[row]) + 2
    return inputs | {"target_logits": torch.cat(parts), "offsets": torch.tensor(offsets), "lengths": lengths}


def with_nan_after_the_end(inputs: Inputs) -> Inputs:
    """Nothing of tokens that are not proposed is known."""
    rows, slots = inputs["tokens"].shape
    draft = inputs["draft"].clone()
    target = inputs["target_logits"].unflatten(0, (rows, slots + 1)).clone()
    accept = inputs["accept_uniform"].clone()
    for row, length in enumerate(inputs["lengths"].tolist()):
        draft[row, length:], target[row, length + 1 :], accept[row, length:] = torch.nan, torch.nan, 0
    return inputs | {"draft": draft, "target_logits": target.flatten(0, 1), "accept_uniform": accept}


def strided(inputs: Inputs) -> Inputs:
    """Everything a part of something larger."""

    def widened(tensor: Tensor, dimension: int) -> Tensor:
        wide = torch.cat([tensor, torch.full_like(tensor, 7)], dim=dimension)
        return wide.narrow(dimension, 0, tensor.shape[dimension])

    uniform = torch.cat([inputs["accept_uniform"], inputs["next_uniform"][:, None]], dim=1)
    return inputs | {
        "tokens": widened(inputs["tokens"], 1),
        "draft": widened(inputs["draft"], 1),
        "target_logits": widened(inputs["target_logits"], 1),
        "accept_uniform": uniform[:, :-1],
        "next_uniform": uniform[:, -1],
    }


def not_finite() -> Inputs:
    """NaN logits in one row, NaN draft in another, no possible token in a third; the last two rows are good."""
    inputs = random_inputs(8, 2, 40)
    inputs["temperatures"] = torch.tensor([1.0, 0.0] * 4)
    of_rows = inputs["target_logits"].unflatten(0, (8, 3))
    of_rows[0, 0, 5] = torch.nan
    of_rows[1:3] = torch.nan
    inputs["draft"][3] = torch.nan
    of_rows[4, 1], of_rows[5] = -torch.inf, -torch.inf
    return inputs


CHUNK = 4096
VOCAB = 13_011
POSSIBLE = [3, 4, 700, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 13_000]  # in three chunks, none in another
IMPOSSIBLE = 5000


def exact_inputs(
    draft: dict[int, float], tokens: list[list[int]], accept: list[list[float]], after: list[float]
) -> Inputs:
    """A target of exactly 1/8 for each possible token at all positions, and one draft for all slots."""
    rows, slots = len(tokens), len(tokens[0])
    logits = torch.full((rows * (slots + 1), VOCAB), -torch.inf)
    logits[:, POSSIBLE] = 2.0
    row = torch.zeros(VOCAB)
    row[list(draft)] = torch.tensor(list(draft.values()))
    return {
        "tokens": torch.tensor(tokens),
        "draft": row.expand(rows, slots, VOCAB),
        "target_logits": logits,
        "temperatures": torch.ones(rows),
        "lengths": None,
        "accept_uniform": torch.tensor(accept, dtype=torch.float64),
        "next_uniform": torch.tensor(after, dtype=torch.float64),
        "offsets": None,
    }


# Leaves a residual of 1/8 for each of the last four possible tokens.
HALF = {POSSIBLE[0]: 1 / 4} | dict.fromkeys(POSSIBLE[1:4], 1 / 8) | {IMPOSSIBLE: 3 / 8}
ONE_TOKEN = [  # token, uniform, uniform after it, tokens kept, next token
    (POSSIBLE[0], 0.5 - LITTLE, 0.0, 1, POSSIBLE[0]),
    (POSSIBLE[0], 0.0, 1 / 8, 1, POSSIBLE[1]),
    (POSSIBLE[0], 0.0, 4 / 8 - LITTLE, 1, POSSIBLE[3]),
    (POSSIBLE[0], 0.0, 4 / 8, 1, POSSIBLE[4]),
    (POSSIBLE[0], 0.0, BELOW_ONE, 1, POSSIBLE[7]),
    (POSSIBLE[0], 0.5, 0.0, 0, POSSIBLE[4]),
    (POSSIBLE[0], 0.5 + LITTLE, 1 / 4 - LITTLE, 0, POSSIBLE[4]),
    (POSSIBLE[0], BELOW_ONE, 1 / 4, 0, POSSIBLE[5]),
    (POSSIBLE[0], BELOW_ONE, 2 / 4 - LITTLE, 0, POSSIBLE[5]),
    (POSSIBLE[0], BELOW_ONE, 2 / 4, 0, POSSIBLE[6]),
    (POSSIBLE[0], BELOW_ONE, 3 / 4, 0, POSSIBLE[7]),
    (POSSIBLE[0], BELOW_ONE, BELOW_ONE, 0, POSSIBLE[7]),
    (POSSIBLE[1], BELOW_ONE, 7 / 8, 1, POSSIBLE[7]),
    (IMPOSSIBLE, 0.0, 0.0, 0, POSSIBLE[4]),
]
# p_1 = 1/2, nothing of the second token's draft is possible, so S_1 = 1/2 and h_1 = 1/2 exactly.
BLOCK = [  # uniforms of both tokens, uniform after them, tokens kept, next token
    (0.5 - LITTLE, 0.0, 1 / 8 - LITTLE, 1, POSSIBLE[0]),
    (0.5 - LITTLE, 0.0, 5 / 8, 1, POSSIBLE[5]),
    (0.5, 0.0, 0.0, 0, POSSIBLE[4]),
    (0.5, 0.0, 3 / 4, 0, POSSIBLE[7]),
]


def one_exact_token() -> Inputs:
    tokens, accept, after, *_ = zip(*ONE_TOKEN, strict=True)
    return exact_inputs(HALF, [[token] for token in tokens], [[uniform] for uniform in accept], list(after))


def exact_block() -> Inputs:
    first, second, after, *_ = zip(*BLOCK, strict=True)
    accept = [list(pair) for pair in zip(first, second, strict=True)]
    inputs = exact_inputs(HALF, [[POSSIBLE[0], IMPOSSIBLE]] * len(BLOCK), accept, list(after))
    draft = inputs["draft"].clone()
    draft[:, 1] = torch.nn.functional.one_hot(torch.tensor(IMPOSSIBLE), VOCAB)
    return inputs | {"draft": draft}


def equal_distributions() -> Inputs:
    return exact_inputs(dict.fromkeys(POSSIBLE, 1 / 8), [POSSIBLE[:3]] * 2, [[BELOW_ONE] * 3] * 2, [0.0, BELOW_ONE])


def nothing_left() -> Inputs:
    """A draft that is nowhere below the target, as rounding can make it."""
    return exact_inputs(
        dict.fromkeys(POSSIBLE, (1 + 2.0**-20) / 8), [[POSSIBLE[2]]] * 2, [[BELOW_ONE]] * 2, [0.0, 7 / 8]
    )


CASES: dict[str, Inputs] = {
    "one row": random_inputs(1, 1, 61),
    "full": random_inputs(7, 4, 300),
    "cut": random_inputs(7, 4, 300, cut=True),
    "packed": packed(random_inputs(7, 4, 300, cut=True)),
    "packed, full": packed(random_inputs(3, 2, 50)),
    "not read": with_nan_after_the_end(random_inputs(7, 4, 300, cut=True)),
    "several chunks": random_inputs(4, 3, 9001, cut=True),
    "bf16": random_inputs(4, 3, 130, torch.bfloat16),
    "packed bf16": packed(random_inputs(4, 3, 130, torch.bfloat16, cut=True)),
    "strided": strided(random_inputs(3, 2, 90, cut=True)),
    "all alike": random_inputs(3, 7, 50, likeness=0.0),
    "nothing alike": random_inputs(4, 2, 50, likeness=9.0),
    "no slots": random_inputs(3, 0, 40),
    "no rows": random_inputs(0, 2, 40),
    "length 0": random_inputs(3, 3, 40) | {"lengths": torch.zeros(3, dtype=torch.long)},
    "greedy": random_inputs(5, 4, 30) | {"temperatures": torch.zeros(5)},
    "not finite": not_finite(),
    "exact": one_exact_token(),
    "exact block": exact_block(),
    "equal": equal_distributions(),
    "nothing left": nothing_left(),
}


def greedy() -> Inputs:
    """One-hot drafts of which the first few follow the target's largest logits."""
    inputs = CASES["greedy"]
    best = inputs["target_logits"].unflatten(0, (5, 5)).argmax(-1)
    tokens = torch.where(torch.arange(4) < torch.arange(5)[:, None], best[:, :4], (best[:, :4] + 1) % 30)
    return inputs | {"tokens": tokens, "draft": torch.nn.functional.one_hot(tokens, 30).float()}


CASES["greedy"] = greedy()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    cases: dict[str, Case] = {
        f"{name}, {rule}": ("verify", inputs | {"rule": rule}) for name, inputs in CASES.items() for rule in RULES
    }
    return in_a_process("interpret", cases, tmp_path_factory.mktemp("rejection"))


def verdict(name: str, rule: str, implementation: str, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    if implementation == "triton":
        return request.getfixturevalue("interpreted")[f"{name}, {rule}"]
    return verify("plain", **CASES[name], rule=rule)


@needs_triton
@of_rules
@pytest.mark.parametrize("name", [name for name in CASES if name != "not finite"])
def test_the_kernels_equal_the_plain_rules(name, rule, request):
    for ours, plain in zip(verdict(name, rule, "triton", request), verdict(name, rule, "plain", request), strict=True):
        assert ours.dtype == torch.long
        assert torch.equal(ours, plain)


@of_rules
@pytest.mark.parametrize("name", ["full", "cut", "several chunks", "bf16", "no slots"])
def test_logits_are_judged_like_their_distributions(name, rule):
    inputs = CASES[name]
    rows, slots = inputs["tokens"].shape
    target = distribution_of(inputs["target_logits"].unflatten(0, (rows, slots + 1)), inputs["temperatures"])
    given = (inputs["tokens"], inputs["draft"], target, inputs["lengths"])
    expected = VERIFICATION_RULES[rule](*given, inputs["accept_uniform"], inputs["next_uniform"])
    accepted, next_token = verify("plain", **inputs, rule=rule)
    assert torch.equal(accepted, expected.accepted)
    assert torch.equal(next_token, expected.next_token)


@both
@of_rules
def test_packed_rows_are_judged_like_padded_ones(rule, implementation, request):
    padded = verdict("cut", rule, implementation, request)
    for name in ("packed", "not read"):
        for ours, same in zip(verdict(name, rule, implementation, request), padded, strict=True):
            assert torch.equal(ours, same)


@both
@of_rules
def test_uniforms_on_a_boundary(rule, implementation, request):
    """Where every number is exact: a drafted token is kept below p_t / p_d and not at it; 0 is never drawn."""
    accepted, next_token = verdict("exact", rule, implementation, request)
    assert accepted.tolist() == [kept for *_, kept, _ in ONE_TOKEN]
    assert next_token.tolist() == [token for *_, token in ONE_TOKEN]


@both
def test_uniforms_on_a_boundary_of_a_block(implementation, request):
    accepted, next_token = verdict("exact block", "block", implementation, request)
    assert accepted.tolist() == [kept for *_, kept, _ in BLOCK]
    assert next_token.tolist() == [token for *_, token in BLOCK]


@both
@of_rules
def test_equal_distributions_keep_everything(rule, implementation, request):
    accepted, next_token = verdict("equal", rule, implementation, request)
    assert accepted.tolist() == [3, 3]
    assert next_token.tolist() == [POSSIBLE[0], POSSIBLE[7]]


@both
@of_rules
def test_without_a_residual_the_target_itself_is_drawn_from(rule, implementation, request):
    accepted, next_token = verdict("nothing left", rule, implementation, request)
    assert accepted.tolist() == [0, 0]
    assert next_token.tolist() == [POSSIBLE[0], POSSIBLE[7]]


@both
@of_rules
def test_greedy_rows_follow_the_largest_logits(rule, implementation, request):
    accepted, next_token = verdict("greedy", rule, implementation, request)
    assert accepted.tolist() == [0, 1, 2, 3, 4]
    best = CASES["greedy"]["target_logits"].unflatten(0, (5, 5)).argmax(-1)
    assert torch.equal(next_token, best.diagonal())


@both
@of_rules
def test_rows_without_a_proposal_draw_from_the_target(rule, implementation, request):
    inputs = CASES["length 0"]
    accepted, next_token = verdict("length 0", rule, implementation, request)
    assert not accepted.any()
    first = distribution_of(inputs["target_logits"].unflatten(0, (3, 4))[:, 0], inputs["temperatures"])
    assert torch.equal(next_token, sample(first.double(), inputs["next_uniform"]))


@both
@of_rules
def test_rows_that_are_not_finite_spoil_no_other(rule, implementation, request):
    accepted, next_token = verdict("not finite", rule, implementation, request)
    assert ((accepted >= 0) & (accepted <= 2)).all()
    assert ((next_token >= 0) & (next_token < 40)).all()
    inputs = CASES["not finite"]
    good = {name: value[-2:] for name, value in inputs.items() if name not in ("target_logits", "lengths", "offsets")}
    good |= {"target_logits": inputs["target_logits"][-6:], "lengths": None, "offsets": None}
    for ours, alone in zip((accepted[-2:], next_token[-2:]), verify("plain", **good, rule=rule), strict=True):
        assert torch.equal(ours, alone)


def test_a_rule_that_does_not_exist():
    with pytest.raises(ValueError, match="rule=greedy: must be one of token, block"):
        verify("plain", **CASES["one row"], rule="greedy")


@needs_triton
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """At full size; token verification is four launches, block verification six."""
    half = random_inputs(2, 7, 151_936, torch.bfloat16)
    cases: dict[str, Case] = {
        "token": ("verify", half | {"rule": "token"}),
        "block": ("verify", random_inputs(2, 7, 151_936) | {"rule": "block"}),
        "packed": ("verify", packed(half) | {"rule": "block"}),
    }
    names = [name for name, _ in in_a_process("compile", cases, tmp_path)]
    token = ["_statistics_of_chunk", "_judge", "_masses_of_chunk", "_draw_next"]
    block = ["_statistics_of_chunk", "_judge", "_surplus_of_chunk", "_judge_block", "_masses_of_chunk", "_draw_next"]
    assert names == token + 2 * block


def on_gpu(inputs: Inputs) -> Inputs:
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()}


@pytest.mark.gpu
@needs_triton
@of_rules
@pytest.mark.parametrize("name", [name for name in CASES if name != "not finite"])
def test_on_a_gpu(name, rule):
    for ours, plain in zip(
        verify(None, **on_gpu(CASES[name]), rule=rule), verify("plain", **CASES[name], rule=rule), strict=True
    ):
        assert torch.equal(ours.cpu(), plain)


@pytest.mark.gpu
@needs_triton
@of_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_full_size_in_a_cuda_graph(rule, dtype):
    given = on_gpu(random_inputs(32, 7, 151_936, dtype, cut=True))
    expected = verify("plain", **given, rule=rule)
    given["tokens"], kept = torch.zeros_like(given["tokens"]), given["tokens"]
    verify("triton", **given, rule=rule)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        verdict = verify("triton", **given, rule=rule)
    given["tokens"].copy_(kept)
    graph.replay()
    for ours, plain in zip(verdict, expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.gpu
@needs_triton
@of_rules
def test_output_on_a_gpu_follows_the_target(rule):
    """The first emitted token of a two-token proposal."""
    rows = 100_000
    one = random_inputs(1, 2, 7)
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(rows, 5, generator=generator, dtype=torch.float64)
    draft = one["draft"].expand(rows, -1, -1).contiguous()
    inputs = {
        "tokens": sample(draft, uniform[:, :2]),
        "draft": draft,
        "target_logits": one["target_logits"].repeat(rows, 1),
        "temperatures": one["temperatures"].repeat(rows),
        "lengths": None,
        "accept_uniform": uniform[:, 2:4],
        "next_uniform": uniform[:, 4],
    }
    accepted, next_token = (result.cpu() for result in verify("triton", **on_gpu(inputs), rule=rule))
    first = torch.where(accepted > 0, inputs["tokens"][:, 0], next_token)
    exact = torch.softmax(one["target_logits"][0].double() / one["temperatures"].double(), -1)
    assert g_test(first, exact) > 1e-3
    assert g_test(inputs["tokens"][:, 0], exact) < 1e-6
