"""Number formats of a feature cache: what comes back, and in how many bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspec.config import CHOICES
from deepspec.features.cache_storage import STORAGES, compress, restore

LAYERS, HIDDEN = 3, 64


def states(tokens: int = 40) -> Tensor:
    """Layers of very different magnitude, tokens too, and a few channels that stand out, as language models have."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(tokens, LAYERS, HIDDEN, generator=generator)
    values[:, :, 5] *= 20
    values *= torch.tensor([0.01, 1.0, 300.0])[:, None]
    values *= torch.logspace(-2, 2, tokens)[:, None, None]
    return values.flatten(1)


def round_trip(values: Tensor, dtype: str) -> Tensor:
    stored, scales = compress(values, LAYERS, STORAGES[dtype])
    assert stored.dtype == STORAGES[dtype].context
    per_token = stored[0].numel() * stored.element_size() + (0 if scales is None else scales[0].numel() * 4)
    assert per_token == STORAGES[dtype].context_bytes(LAYERS, HIDDEN)
    return restore(stored, scales, torch.float32)


def test_names_are_those_of_the_configuration():
    assert tuple(STORAGES) == CHOICES["features.cache_dtype"]


def test_float32_is_exact():
    assert torch.equal(round_trip(states(), "float32"), states())


def test_bfloat16_rounds_once():
    values = states()
    error = (round_trip(values, "bfloat16") - values).abs()
    assert (error <= values.abs() * 2**-8).all()
    rounded = values.bfloat16()
    assert torch.equal(restore(*compress(rounded, LAYERS, STORAGES["bfloat16"]), torch.bfloat16), rounded)


def largest_of_layer(values: Tensor) -> Tensor:
    """[tokens, layers * hidden], of each token and layer."""
    largest = values.unflatten(1, (LAYERS, HIDDEN)).abs().amax(-1, keepdim=True)
    return largest.expand(-1, -1, HIDDEN).flatten(1)


def test_int8_is_off_by_half_a_step_of_its_layer():
    values = states()
    error = (round_trip(values, "int8") - values).abs()
    step = largest_of_layer(values) / 127
    assert (error <= step * 0.5001).all()
    assert (error > step * 0.4).any()


def test_float8_keeps_three_bits_of_every_number():
    values = states()
    error = (round_trip(values, "float8") - values).abs()
    smallest_step = largest_of_layer(values) / 448 * 2**-9  # of the subnormal numbers
    assert (error <= torch.maximum(values.abs() * 2**-4, smallest_step / 2) * 1.0001).all()
    assert (error > values.abs() * 2**-5).any()


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_largest_and_zero_come_back(dtype):
    values = states()
    values[3] = 0
    values[4, :HIDDEN] = 0
    back = round_trip(values, dtype)
    is_largest = values.abs() == largest_of_layer(values)
    torch.testing.assert_close(back[is_largest], values[is_largest], rtol=1e-6, atol=0)
    assert torch.equal(back[values == 0], values[values == 0])
    assert back.isfinite().all()


@pytest.mark.parametrize("dtype", STORAGES)
def test_bfloat16_states_and_no_states_at_all(dtype):
    values = states().bfloat16()
    stored, scales = compress(values, LAYERS, STORAGES[dtype])
    back = restore(stored, scales, torch.bfloat16)
    assert back.dtype == torch.bfloat16
    relative = (back.float() - values.float()).norm() / values.float().norm()
    assert relative < {"float32": 1e-9, "bfloat16": 1e-9, "float8": 0.04, "int8": 0.02}[dtype]
    assert restore(*compress(values[:0], LAYERS, STORAGES[dtype]), torch.float32).shape == (0, LAYERS * HIDDEN)
