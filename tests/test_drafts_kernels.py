"""Fast kernels against their plain meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspec.kernels.attention import (
    block_attention,
    block_attention_joint,
    block_attention_masked,
    block_attention_single,
)
from deepspec.kernels.losses import vocabulary_losses, vocabulary_losses_reference


def attention_inputs(context: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 5, 8), (2, 2, context, 8), (2, 2, context, 8), (2, 2, 3, 5, 8), (2, 2, 3, 5, 8)]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    visible = torch.arange(context) < torch.tensor([[0, 4, context], [1, 2, 3]])[..., None]
    return tensors, visible


@pytest.mark.parametrize("context", [0, 7])
def test_joint_attention_equals_masked_attention(context: int) -> None:
    tensors, visible = attention_inputs(context)
    fast, plain = (kernel(*tensors, visible, 0.3) for kernel in (block_attention_joint, block_attention_masked))
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(output, tensors, upstream) for output in (fast, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [0, 7])
def test_attention_of_a_single_block_equals_masked_attention(context: int) -> None:
    tensors, visible = attention_inputs(context)
    for block in range(3):
        query, key, value = (tensors[i][:, :, block : block + 1] for i in (0, 3, 4))
        inputs = query, tensors[1], tensors[2], key, value, visible[:, block : block + 1], 0.3
        torch.testing.assert_close(block_attention_single(*inputs), block_attention_masked(*inputs))


def test_large_scores_do_not_overflow() -> None:
    tensors, visible = attention_inputs(7)
    output = block_attention(tensors[0] * 1e4, *tensors[1:], visible, 1.0)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


def test_what_is_not_visible_has_no_weight_at_all() -> None:
    tensors, visible = attention_inputs(7)
    before = block_attention(*tensors, visible, 0.3)
    huge = tensors[2].detach().clone()
    huge[:, :, 5:] = 1e20  # only block 2 of row 0 sees these
    after = block_attention(tensors[0], tensors[1], huge, *tensors[3:], visible, 0.3)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0, :, :2], after[0, :, :2])


def loss_inputs(rows: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(rows, 6, generator=generator).requires_grad_(),
        "latents": torch.randn(rows, 3, generator=generator).requires_grad_(),
        "head": torch.randn(11, 6, generator=generator),
        "markov_w2": torch.randn(11, 3, generator=generator).requires_grad_(),
        "targets": torch.randint(0, 11, (rows,), generator=generator),
        "target_hidden": torch.randn(rows, 6, generator=generator),
        "weights": torch.rand(rows, generator=generator),
    }


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize(("ce", "tv"), [(1.0, 0.0), (0.0, 1.0), (0.1, 0.9)])
@pytest.mark.parametrize("markov", [True, False])
def test_chunked_losses_equal_the_plain_ones(chunk_rows: int, ce: float, tv: float, markov: bool) -> None:
    inputs = loss_inputs(10)
    if not markov:
        inputs |= {"latents": None, "markov_w2": None}
    trained = [inputs[name] for name in ("hidden", "latents", "markov_w2") if inputs[name] is not None]
    fast = vocabulary_losses(*inputs.values(), ce, tv, chunk_rows=chunk_rows)
    plain = vocabulary_losses_reference(*inputs.values(), ce, tv)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(losses.loss * 0.7, trained) for losses in (fast, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_equal_distributions_have_no_distance() -> None:
    inputs = loss_inputs(10)
    inputs |= {"latents": None, "markov_w2": None, "target_hidden": inputs["hidden"].detach().clone()}
    losses = vocabulary_losses(*inputs.values(), 0.0, 1.0)
    assert losses.l1 is not None
    assert losses.l1.max() < 1e-6


def test_no_rows_give_zero_and_zero_gradients() -> None:
    inputs = loss_inputs(0)
    losses = vocabulary_losses(*inputs.values(), 0.1, 0.9)
    losses.loss.backward()
    assert losses.loss.item() == 0
    assert torch.equal(inputs["markov_w2"].grad, torch.zeros(11, 3))


def test_without_target_states_there_is_no_distance() -> None:
    inputs = loss_inputs(4) | {"target_hidden": None}
    assert vocabulary_losses(*inputs.values(), 1.0, 0.0).l1 is None
    with pytest.raises(ValueError, match="target_hidden"):
        vocabulary_losses(*inputs.values(), 1.0, 0.5)


def test_cross_entropy_of_an_impossible_token_is_exact() -> None:
    losses = vocabulary_losses(
        torch.tensor([[200.0]]),
        None,
        torch.tensor([[1.0], [-1.0]]),
        None,
        torch.tensor([1]),
        None,
        torch.ones(1),
        1.0,
        0.0,
    )
    assert losses.ce.item() == pytest.approx(400.0)
