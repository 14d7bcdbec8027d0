"""Fast kernels against their plain meaning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from deepspec.kernels import attention
from deepspec.kernels.attention import (
    ContextSpans,
    block_attention,
    block_attention_chunked,
    block_attention_flex,
    block_attention_masked,
    block_attention_single,
)

Inputs = tuple[list[Tensor], ContextSpans]


def attention_inputs(
    context: int, lasts: list[list[int]] | None = None, firsts: list[list[int]] | None = None
) -> Inputs:
    """Two rows of blocks of five slots; by default some blocks see nothing, some everything."""
    last = torch.tensor(lasts or [[0, 4, context], [1, 2, 3]]).clamp(max=context)
    first = torch.zeros_like(last) if firsts is None else torch.tensor(firsts)
    rows, blocks = last.shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 4, blocks, 5, 8), *[(rows, 2, context, 8)] * 2, *[(rows, 2, blocks, 5, 8)] * 2]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return tensors, ContextSpans(first, last)


PACKED = attention_inputs(
    40, lasts=[[5, 9, 10, 14, 20, 33, 40]], firsts=[[0, 0, 0, 12, 12, 21, 21]]
)  # three documents in a row


@pytest.mark.parametrize("inputs", [attention_inputs(0), attention_inputs(7), PACKED], ids=["none", "rows", "packed"])
@pytest.mark.parametrize("overhead", [1, 12 * 1000, 2**16])
def test_chunked_attention_equals_masked_attention(
    inputs: Inputs, overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK_OVERHEAD", overhead)
    tensors, given = inputs
    spans = ContextSpans(given.first, given.last)  # with chunks of its own
    fast, plain = (kernel(*tensors, spans, 0.3) for kernel in (block_attention_chunked, block_attention_masked))
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(output, tensors, upstream) for output in (fast, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_chunks_cover_every_block_once_and_do_not_mix_long_documents() -> None:
    lasts = list(range(100, 1100, 10)) + list(range(1200, 2100, 10))
    firsts = [0] * 100 + [1100] * 90
    spans = ContextSpans(torch.tensor([firsts]), torch.tensor([lasts]))
    chunks = spans.chunks(10)
    covered = [block for chunk in chunks for block in range(chunk.blocks.start, chunk.blocks.stop)]
    assert covered == list(range(190))
    for chunk in chunks:
        assert (chunk.columns.start, chunk.columns.stop) == (
            min(firsts[chunk.blocks]),
            max(lasts[chunk.blocks]),
        )
    computed = sum(
        (chunk.blocks.stop - chunk.blocks.start) * (chunk.columns.stop - chunk.columns.start) for chunk in chunks
    )
    needed = sum(last - first for first, last in zip(firsts, lasts, strict=True))
    assert computed <= needed + len(chunks) * attention.CHUNK_OVERHEAD / 10


def test_memory_of_chunked_attention_grows_with_blocks_plus_context() -> None:
    """What is kept for the backward pass: no tensor of blocks times context."""
    kept: list[int] = []
    tensors, spans = attention_inputs(256, lasts=[list(range(4, 260, 4))] * 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        block_attention_chunked(*tensors, spans, 0.3)
    assert kept
    assert max(kept) <= max(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("inputs", [attention_inputs(7), PACKED], ids=["rows", "packed"])
def test_flex_attention_equals_masked_attention(inputs: Inputs) -> None:
    """Its mask and its numbers; the compiled kernel needs a GPU."""
    tensors, spans = ([tensor.detach() for tensor in inputs[0]], inputs[1])
    flexible, plain = (kernel(*tensors, spans, 0.3) for kernel in (block_attention_flex, block_attention_masked))
    torch.testing.assert_close(flexible, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_the_flex_mask_is_the_one_that_pytorch_makes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, blocks, slots = (int(rng.integers(1, largest)) for largest in (3, 90, 9))
    columns = int(rng.integers(1, 900))
    first = torch.from_numpy(rng.integers(0, columns + 1, (rows, blocks)) // 3)
    last = (first + torch.from_numpy(rng.integers(0, 600, (rows, blocks)))).clamp(max=columns)
    spans = ContextSpans(first, last)
    for ours in (spans.flex_mask(slots, columns), spans.context_flex_mask(columns)):
        theirs = create_block_mask(ours.mask_mod, rows, None, *ours.seq_lengths, device="cpu")
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, indices = (getattr(ours, f"{name}_{what}") for what in ("num_blocks", "indices"))
            assert torch.equal(counts, getattr(theirs, f"{name}_num_blocks")), name
            assert torch.equal(indices, getattr(theirs, f"{name}_indices")), name


def test_flex_attention_under_autocast() -> None:
    """Norms give float32 queries and keys beside bfloat16 values."""
    tensors, spans = attention_inputs(7)
    mixed = [tensor.detach() for tensor in tensors]
    mixed[2], mixed[4] = mixed[2].bfloat16(), mixed[4].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        flexible = block_attention_flex(*mixed, spans, 0.3)
    assert flexible.dtype == torch.bfloat16
    plain = block_attention_masked(*(tensor.detach() for tensor in tensors), spans, 0.3)
    torch.testing.assert_close(flexible.float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[300], [100, 500, 37]])
def test_compiled_flex_attention_equals_chunked_attention(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    first = torch.tensor([[start for start, end in zip(starts, ends, strict=True) for _ in range(start, end, 9)]])
    last = torch.tensor([[column for start, end in zip(starts, ends, strict=True) for column in range(start, end, 9)]])
    blocks, context = first.shape[1], ends[-1]
    shapes = [(1, 8, blocks, 7, 64), *[(1, 4, context, 64)] * 2, *[(1, 4, blocks, 7, 64)] * 2]
    host = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    device = [tensor.detach().cuda().requires_grad_() for tensor in host]
    plain = block_attention_chunked(*host, ContextSpans(first, last), 0.125)
    fast = block_attention_flex(*device, ContextSpans(first.cuda(), last.cuda()), 0.125)
    torch.testing.assert_close(fast.cpu(), plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(fast.square().sum(), device), torch.autograd.grad(plain.square().sum(), host), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [0, 7])
def test_attention_of_a_single_block_equals_masked_attention(context: int) -> None:
    tensors, spans = attention_inputs(context)
    for block in range(3):
        query, key, value = (tensors[i][:, :, block : block + 1] for i in (0, 3, 4))
        span = ContextSpans(spans.first[:, block : block + 1], spans.last[:, block : block + 1])
        inputs = query, tensors[1], tensors[2], key, value, span, 0.3
        torch.testing.assert_close(block_attention_single(*inputs), block_attention_masked(*inputs))


def test_large_scores_do_not_overflow() -> None:
    tensors, spans = attention_inputs(7)
    output = block_attention(tensors[0] * 1e4, *tensors[1:], spans, 1.0)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


def test_what_is_not_visible_has_no_weight_at_all() -> None:
    tensors, spans = attention_inputs(7)
    before = block_attention(*tensors, spans, 0.3)
    huge = tensors[2].detach().clone()
    huge[:, :, 5:] = 1e20  # only block 2 of row 0 sees these
    after = block_attention(tensors[0], tensors[1], huge, *tensors[3:], spans, 0.3)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0, :, :2], after[0, :, :2])
