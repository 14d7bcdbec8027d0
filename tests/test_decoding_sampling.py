"""Distributions and draws: equal to Transformers' warpers, exact inversion, nothing of weight zero."""

from __future__ import annotations

import pytest
import torch
from decoding_world import warped
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.sampling import LARGEST_UNIFORM, SamplingSettings, UniformStream, draw, probabilities, sample

VOCAB = 50


def settings_of(*rows: tuple[float, int, float], vocab: int = VOCAB) -> SamplingSettings:
    temperatures, top_ks, top_ps = zip(*rows, strict=True)
    return SamplingSettings.of_rows(temperatures, top_ks, top_ps, vocab, torch.device("cpu"))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 20, 0.8), (1.0, 5, 1.0), (1.3, 0, 0.5), (1.0, 1, 1.0), (0.05, 0, 0.999)],
)
def test_distribution_equals_the_warpers_of_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0))
    ours = probabilities(logits.view(8, 5, VOCAB), settings_of(*[(temperature, top_k, top_p)] * 8)).view(40, VOCAB)
    expected = warped(logits, temperature, top_k, top_p)
    assert ours.dtype == torch.float32
    assert torch.equal(ours > 0, expected.float() > 0)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


def test_rows_keep_their_own_settings():
    rows = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 3, 1.0), (0.0, 4, 0.3), (1.5, 0, 0.6)]
    logits = torch.randn(len(rows), 3, VOCAB, generator=torch.Generator().manual_seed(1))
    together = probabilities(logits, settings_of(*rows))
    for i, row in enumerate(rows):
        assert torch.equal(together[i], probabilities(logits[i : i + 1], settings_of(row))[0])
    assert together[0].amax(-1).eq(1).all()
    assert torch.equal(together[0].argmax(-1), logits[0].argmax(-1))


def test_half_precision_logits_are_widened_first():
    logits = torch.randn(1, 1, VOCAB).bfloat16()
    result = probabilities(logits, settings_of((0.6, 0, 1.0)))
    torch.testing.assert_close(result[0].double(), warped(logits[0].float(), 0.6, 0, 1.0), atol=1e-6, rtol=1e-5)


def test_a_tiny_temperature_stays_finite():
    logits = torch.tensor([[[3.0, 500.0, -1e4]]])
    assert probabilities(logits, settings_of((1e-44, 0, 1.0), vocab=3)).tolist() == [[[0.0, 1.0, 0.0]]]


def test_greedy_rows_alone_never_write_a_distribution_down():
    logits = torch.randn(2, 3, VOCAB)
    tokens, distribution = draw(logits, settings_of((0.0, 0, 1.0), (0.0, 5, 0.5)), None)
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
