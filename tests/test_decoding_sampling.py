"""Distributions and draws: equal to Transformers' warpers, exact inversion, nothing of weight zero."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from decoding_world import warped
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.requests import Request
from deepspec.decoding.sampling import (
    LARGEST_UNIFORM,
    SamplingSettings,
    UniformStream,
    draw,
    draw_token,
    probabilities,
    sample,
)

VOCAB = 50


def settings_of(*rows: dict[str, Any], vocab: int = VOCAB) -> SamplingSettings:
    return SamplingSettings.of_requests([Request([0], 1, **row) for row in rows], vocab, torch.device("cpu"))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (0.7, 20, 0.8, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.3, 0, 0.5, 0.0),
        (1.0, 1, 1.0, 0.0),
        (0.05, 0, 0.999, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.7, 0, 1.0, 0.3),
        (1.5, 30, 0.95, 0.02),
        (2.0, 10, 1.0, 0.1),
        (1.0, 0, 1.0, 1.0),
    ],
)
def test_distribution_equals_the_warpers_of_transformers(temperature, top_k, top_p, min_p):
    row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits = 3 * torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0))
    ours = probabilities(logits.view(8, 5, VOCAB), settings_of(*[row] * 8)).view(40, VOCAB)
    expected = warped(logits, **row)
    assert ours.dtype == torch.float32
    assert torch.equal(ours > 0, expected.float() > 0)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


def test_min_p_looks_at_what_top_p_has_kept():
    """Dropping first would leave the two likeliest tokens 8/9 of the mass, and top-p the first of them alone."""
    logits = torch.tensor([[[0.4, 0.4, 0.1, 0.1]]]).log()
    kept = probabilities(logits, settings_of({"temperature": 1.0, "top_p": 0.85, "min_p": 0.2}, vocab=4))
    assert kept.gt(0).tolist() == [[[True, True, True, True]]]


def test_rows_keep_their_own_settings():
    rows = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 0.0, "top_k": 4, "top_p": 0.3, "min_p": 0.5},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 0.9, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 9, "min_p": 0.2},
    ]
    logits = torch.randn(len(rows), 3, VOCAB, generator=torch.Generator().manual_seed(1))
    together = probabilities(logits, settings_of(*rows))
    for i, row in enumerate(rows):
        assert torch.equal(together[i], probabilities(logits[i : i + 1], settings_of(row))[0])
    assert together[0].amax(-1).eq(1).all()
    assert torch.equal(together[0].argmax(-1), logits[0].argmax(-1))


REQUEST_SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.one_of(st.just(0.0), st.just(1.0), st.floats(0.05, 5)),
        "top_k": st.integers(0, 12),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 1)),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1)),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 10), st.lists(REQUEST_SETTINGS, min_size=1, max_size=3))
def test_any_distribution_is_the_softmax_cut_at_a_border(data, vocab, rows):
    one_row = st.lists(st.floats(-30, 30, width=16), min_size=vocab, max_size=vocab)
    logits = torch.tensor(data.draw(st.lists(one_row, min_size=len(rows), max_size=len(rows))))[:, None]
    together = probabilities(logits, settings_of(*rows, vocab=vocab))
    for i, row in enumerate(rows):
        ours, theirs = together[i, 0], logits[i, 0]
        assert torch.equal(ours, probabilities(logits[i : i + 1], settings_of(row, vocab=vocab))[0, 0])
        if row["temperature"] == 0:
            assert ours.tolist() == torch.eye(vocab)[theirs.argmax()].tolist()
            continue
        whole, kept = torch.softmax(theirs / row["temperature"], 0), ours > 0
        torch.testing.assert_close(ours[kept], whole[kept] / whole[kept].sum(), rtol=1e-4, atol=1e-12)
        assert kept[theirs.argmax()]
        border = whole[kept].min()
        assert not (~kept & (whole > border)).any()
        assert border >= row["min_p"] * whole.max() * (1 - 1e-5)
        dropped = whole[~kept & (whole > 0)]
        if len(dropped):  # some setting wanted the likeliest dropped one out
            likeliest, more_likely = dropped.max(), whole[whole > dropped.max()]
            of_top_k = whole.topk(min(row["top_k"] or vocab, vocab)).values
            assert (
                (row["top_k"] and len(more_likely) >= row["top_k"])
                or (row["top_p"] < 1 and more_likely.sum() >= row["top_p"] * of_top_k.sum() * (1 - 1e-5))
                or likeliest <= row["min_p"] * whole.max() * (1 + 1e-5)
            )


def test_top_k_alone_keeps_tokens_of_any_small_probability():
    logits = torch.tensor([[[0.0, -25.0, -26.0, -27.0]]])
    kept = probabilities(logits, settings_of({"temperature": 1.0, "top_k": 3}, vocab=4))
    assert kept.gt(0).tolist() == [[[True, True, True, False]]]


def by_sorting(logits: torch.Tensor, row: dict[str, Any]) -> torch.Tensor:
    """The distribution [vocab] of one row, from the sorted vocabulary."""
    if not row["temperature"]:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    result = torch.softmax(logits / row["temperature"], 0)
    kth = result.sort(descending=True).values[min(row["top_k"] or len(logits), len(logits)) - 1]
    ordered = result.masked_fill(result < kth, 0.0).sort(descending=True).values
    if row["top_p"] < 1:
        ordered = ordered.masked_fill(ordered.cumsum(0) - ordered >= row["top_p"] * ordered.sum(), 0.0)
    border = torch.maximum(ordered[ordered > 0].min(), row["min_p"] * result.max())
    kept = result.masked_fill(result < border, 0.0)
    return kept / kept.sum()


@pytest.mark.parametrize("trial", range(12))
def test_the_likeliest_tokens_tell_what_sorting_tells(trial):
    """Over a vocabulary that is not sorted at once; flat rows need more of it, rounded ones have ties at the border."""
    draws = random.Random(trial)
    rows = [
        {
            "temperature": draws.choice([0.0, 0.05, 0.7, 1.0, 1.5]),
            "top_k": draws.choice([0, 0, 5, 127, 128, 129, 1000, 3000]),
            "top_p": draws.choice([0.01, 0.5, 0.9, 0.99, 1.0]),
            "min_p": draws.choice([0.0, 0.0, 0.001, 0.05]),
        }
        for _ in range(8)
    ]
    vocab, generator = draws.choice([600, 3500, 10_000]), torch.Generator().manual_seed(trial)
    scale = torch.tensor([draws.choice([0.01, 0.5, 1.0, 3.0, 10.0]) for _ in rows])
    logits = scale[:, None, None] * torch.randn(8, 2, vocab, generator=generator)
    if trial % 3 == 0:
        logits = (2 * logits).round() / 2
    wanted = torch.stack(
        [torch.stack([by_sorting(x, row) for x in of_row]) for of_row, row in zip(logits, rows, strict=True)]
    )
    ours = probabilities(logits, settings_of(*rows, vocab=vocab))
    assert torch.equal(ours > 0, wanted > 0)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-12)
    uniform = torch.rand(8, generator=generator, dtype=torch.float64)
    tokens = draw_token(logits[:, 0], settings_of(*rows, vocab=vocab), uniform)
    assert torch.equal(tokens, sample(ours[:, 0], uniform))


def test_half_precision_logits_are_widened_first():
    logits = torch.randn(1, 1, VOCAB).bfloat16()
    result = probabilities(logits, settings_of({"temperature": 0.6}))
    torch.testing.assert_close(result[0].double(), warped(logits[0].float(), 0.6), atol=1e-6, rtol=1e-5)


def test_a_tiny_temperature_stays_finite():
    logits = torch.tensor([[[3.0, 500.0, -1e4]]])
    assert probabilities(logits, settings_of({"temperature": 1e-44}, vocab=3)).tolist() == [[[0.0, 1.0, 0.0]]]


def test_greedy_rows_alone_never_write_a_distribution_down():
    logits = torch.randn(2, 3, VOCAB)
    tokens, distribution = draw(logits, settings_of({}, {"top_k": 5, "top_p": 0.5, "min_p": 0.5}), None)
    assert distribution is None
    assert torch.equal(tokens, logits.argmax(-1))


def test_draw_inverts_the_cumulative_sum():
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, LARGEST_UNIFORM], dtype=torch.float64)
    assert sample(weights.expand(6, -1), uniform).tolist() == [1, 1, 3, 3, 4, 4]
    assert sample((3 * weights).expand(6, -1), uniform).tolist() == [1, 1, 3, 3, 4, 4]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(2**-100, 1e6, width=32)), min_size=1, max_size=12).filter(any),
    st.one_of(st.sampled_from([0.0, LARGEST_UNIFORM]), st.floats(0, LARGEST_UNIFORM)),
)
def test_a_token_of_weight_zero_is_never_drawn(weights, uniform):
    drawn = sample(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64)).item()
    assert weights[drawn] > 0


def test_a_stream_is_a_function_of_its_seed():
    first, again, other = (UniformStream(seed, 5) for seed in (3, 3, 4))
    drawn = torch.stack([first.draw() for _ in range(100)])
    assert torch.equal(drawn, torch.stack([again.draw() for _ in range(100)]))
    assert not torch.equal(drawn, torch.stack([other.draw() for _ in range(100)]))
    assert drawn.dtype == torch.float64
    assert drawn.unique().numel() == drawn.numel()
    assert drawn.min() >= 0
    assert drawn.max() <= LARGEST_UNIFORM
