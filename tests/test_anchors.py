"""Anchors and labels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from deepspec.training.anchors import sample_anchors, supervise


def masks(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(character) for character in row] for row in rows])


def drawn(loss_mask: torch.Tensor, num_anchors: int, seeds: list[int]) -> list[list[int]]:
    anchors, mask = sample_anchors(loss_mask, num_anchors, seeds)
    return [row[kept].tolist() for row, kept in zip(anchors, mask, strict=True)]


def test_an_anchor_and_its_next_token_are_supervised() -> None:
    assert drawn(masks("0011101101"), 10, [0]) == [[2, 3, 6]]


def test_fewer_candidates_end_in_padding_blocks() -> None:
    anchors, mask = sample_anchors(masks("01111", "00011", "01010"), 3, [0, 1, 2])
    assert anchors.tolist() == [[1, 2, 3], [3, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_no_candidate_anywhere_still_gives_one_padding_block() -> None:
    anchors, mask = sample_anchors(masks("00100"), 3, [0])
    assert anchors.shape == mask.shape == (1, 1)
    assert not mask.any()


def test_uniform_without_replacement() -> None:
    loss_mask = torch.ones(1, 9)
    counts: Counter[int] = Counter()
    draws = 2000
    for seed in range(draws):
        (anchors,) = drawn(loss_mask, 3, [seed])
        assert anchors == sorted(set(anchors))
        assert len(anchors) == 3
        counts.update(anchors)
    assert set(counts) == set(range(8))
    expected = draws * 3 / 8  # standard deviation below 22
    assert all(abs(count - expected) < 100 for count in counts.values())


def test_a_row_depends_only_on_its_seed_and_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    loss_mask = (torch.rand(4, 40, generator=generator) < 0.8).long()
    seeds = [5, 2**40 + 5, 7, 5]
    together = drawn(loss_mask, 6, seeds)
    assert together == drawn(loss_mask, 6, seeds)
    for row in range(4):
        padded = torch.cat([loss_mask[row : row + 1], torch.zeros(1, 9, dtype=torch.long)], dim=1)
        assert drawn(padded, 6, [seeds[row]]) == [together[row]]
    same_mask = loss_mask[:1].repeat(3, 1)
    first, second, third = drawn(same_mask, 6, [5, 2**32 + 5, 6])
    assert first != second
    assert first != third


def test_the_global_random_state_is_not_touched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sample_anchors(torch.ones(1, 30), 4, [1])
    assert torch.equal(torch.rand(1), expected)


def test_one_seed_per_row() -> None:
    with pytest.raises(ValueError, match="1 seeds for 2 rows"):
        sample_anchors(torch.ones(2, 5), 2, [0])


def test_slot_k_is_the_token_k_after_the_anchor_and_stops_at_the_turn_end() -> None:
    ids = torch.arange(100, 112)[None]
    loss_mask = masks("011110011111")
    anchors = torch.tensor([[1, 3, 7, 10, 0]])
    block_mask = torch.tensor([[True, True, True, True, False]])
    labels = supervise(ids, loss_mask, anchors, block_mask, 4, 4.0)
    assert labels.supervised[0].long().tolist() == [
        [1, 1, 1, 0],  # 2, 3, 4; 5 is the user's
        [1, 0, 0, 0],  # 4; never 7, which is on again after the gap
        [1, 1, 1, 1],
        [1, 0, 0, 0],  # 11 is the last token
        [0, 0, 0, 0],
    ]
    assert labels.targets[0, 0, :3].tolist() == [102, 103, 104]
    assert labels.prev_tokens[0, 0].tolist() == [101, 102, 103, 104]
    assert labels.source_positions[0, 0].tolist() == [1, 2, 3, 4]
    assert labels.targets[0, 3, 0].item() == 111


def test_weights_decay_over_slots() -> None:
    labels = supervise(
        torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9), torch.tensor([[5]]), torch.ones(1, 1), 5, 2.0
    )
    expected = torch.where(labels.supervised[0, 0], torch.exp(-torch.arange(5.0) / 2), 0.0)
    torch.testing.assert_close(labels.weights[0, 0], expected)
    assert labels.supervised[0, 0].tolist() == [True, True, True, False, False]
