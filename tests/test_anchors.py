"""Anchors and labels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from deepspec.data.packing import Sample, TokenBatch, lay_out
from deepspec.training.anchors import SlotLabels, sample_anchors, supervise


def documents(*rows: str) -> TokenBatch:
    """One row per string; "0110 011" is a row of two documents with these loss masks."""
    samples = [[sample(mask) for mask in row.split()] for row in rows]
    return lay_out(samples, pad_id=0)


def sample(mask: str) -> Sample:
    return Sample(0, 0, "", list(range(100, 100 + len(mask))), [int(character) for character in mask])


def drawn(batch: TokenBatch, num_anchors: int, seeds: list[int]) -> list[list[int]]:
    anchors, mask = sample_anchors(batch, num_anchors, seeds)
    return [row[kept].tolist() for row, kept in zip(anchors, mask, strict=True)]


def labels_of(
    batch: TokenBatch, anchors: list[list[int]], block_size: int, decay: float = 4.0, mask=None
) -> SlotLabels:
    columns = torch.tensor(anchors)
    mask = torch.ones_like(columns, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return supervise(batch.input_ids, batch.position_ids, batch.loss_mask, columns, mask, block_size, decay)


def supervised(labels: SlotLabels) -> list[list[int]]:
    """1 where a slot of the first row carries loss."""
    shape = labels.prev_tokens.shape
    return torch.zeros(shape.numel(), dtype=torch.long).index_fill_(0, labels.slots, 1).view(shape)[0].tolist()


def test_an_anchor_and_its_next_token_are_supervised() -> None:
    assert drawn(documents("0011101101"), 10, [0]) == [[2, 3, 6]]


def test_fewer_candidates_end_in_padding_blocks() -> None:
    anchors, mask = sample_anchors(documents("01111", "00011", "01010"), 3, [0, 1, 2])
    assert anchors.tolist() == [[1, 2, 3], [3, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_no_candidate_anywhere_still_gives_one_padding_block() -> None:
    anchors, mask = sample_anchors(documents("00100"), 3, [0])
    assert anchors.shape == mask.shape == (1, 1)
    assert not mask.any()


def test_uniform_without_replacement() -> None:
    batch = documents("1" * 9)
    counts: Counter[int] = Counter()
    draws = 2000
    for seed in range(draws):
        (anchors,) = drawn(batch, 3, [seed])
        assert anchors == sorted(set(anchors))
        assert len(anchors) == 3
        counts.update(anchors)
    assert set(counts) == set(range(8))
    expected = draws * 3 / 8  # standard deviation below 22
    assert all(abs(count - expected) < 100 for count in counts.values())


def test_a_document_depends_only_on_its_seed_and_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = ["".join(str(int(bit)) for bit in torch.rand(40, generator=generator) < 0.8) for _ in range(4)]
    seeds = [5, 2**40 + 5, 7, 5]
    together = drawn(documents(*rows), 6, seeds)
    assert together == drawn(documents(*rows), 6, seeds)
    for row in range(4):
        assert drawn(documents(rows[row] + "0" * 9), 6, [seeds[row]]) == [together[row]]
    (packed,) = drawn(documents(" ".join(rows)), 6, seeds)
    assert packed == [40 * row + column for row in range(4) for column in together[row]]
    first, second, third = drawn(documents(*rows[:1] * 3), 6, [5, 2**32 + 5, 6])
    assert first != second
    assert first != third


def test_the_global_random_state_is_not_touched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sample_anchors(documents("1" * 30), 4, [1])
    assert torch.equal(torch.rand(1), expected)


def test_one_seed_per_document() -> None:
    with pytest.raises(ValueError, match="1 seeds for 2 documents"):
        sample_anchors(documents("11111 11111"), 2, [0])


def test_slot_k_is_the_token_k_after_the_anchor_and_stops_at_the_turn_end() -> None:
    labels = labels_of(documents("011110011111"), [[1, 3, 7, 10, 0]], 4, mask=[[True, True, True, True, False]])
    assert supervised(labels) == [
        [1, 1, 1, 0],  # 2, 3, 4; 5 is the user's
        [1, 0, 0, 0],  # 4; never 7, which is on again after the gap
        [1, 1, 1, 1],
        [1, 0, 0, 0],  # 11 is the last token
        [0, 0, 0, 0],
    ]
    assert labels.targets[:3].tolist() == [102, 103, 104]
    assert labels.prev_tokens[0, 0].tolist() == [101, 102, 103, 104]
    assert labels.sources[:3].tolist() == [1, 2, 3]
    assert labels.targets[-1].item() == 111


def test_a_block_stops_at_the_end_of_its_document() -> None:
    labels = labels_of(documents("01111 1111 11"), [[2, 3, 5, 7, 9]], 4)
    assert supervised(labels) == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert labels.targets.tolist() == [103, 104, 104, 101, 102, 103, 103, 101]
    assert labels.sources.tolist() == [2, 3, 3, 5, 6, 7, 7, 9]


def test_sources_count_over_all_rows() -> None:
    labels = labels_of(documents("0111", "1111"), [[1], [2]], 2)
    assert labels.sources.tolist() == [1, 2, 6]
    assert labels.slots.tolist() == [0, 1, 2]


def test_weights_decay_over_slots() -> None:
    labels = labels_of(documents("1" * 9), [[5]], 5, decay=2.0)
    torch.testing.assert_close(labels.weights, torch.exp(-torch.arange(3.0) / 2))
