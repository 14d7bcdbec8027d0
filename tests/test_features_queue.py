"""Features computed ahead: in order, never the same twice, and never after a failure."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import token_batch

from deepspec.features import FeatureQueue
from deepspec.targets import TargetFeatures

CPU = torch.device("cpu")


class Numbered:
    """Features that hold the batch's first token; the batch that starts with `broken` fails."""

    concurrency = 1
    is_remote = False
    closed = False

    def __init__(self, broken: int | None = None):
        self.broken = broken
        self.asked: list[int] = []
        self.threads: set[str] = set()

    def batch_features(self, batch):
        number = int(batch.input_ids[0, 0])
        self.asked.append(number)
        self.threads.add(threading.current_thread().name)
        if number == self.broken:
            raise OSError(f"batch {number} is lost")
        return TargetFeatures(torch.full((1, 1, 1), float(number)), torch.zeros(1, 1, 1))

    def close(self):
        self.closed = True


def batches(count):
    return [token_batch(torch.tensor([[number]])) for number in range(count)]


@pytest.mark.parametrize("lookahead", [0, 1, 4])
def test_in_order_and_not_too_early(lookahead):
    source = Numbered()
    queue = FeatureQueue(source, lookahead, CPU)
    queue.announce(batches(6))
    for number in range(6):
        assert float(queue.next().context) == number
        assert len(source.asked) <= number + 1 + lookahead
    queue.close()
    assert source.closed
    assert source.asked == list(range(6))
    assert (threading.current_thread().name in source.threads) == (lookahead == 0)


@pytest.mark.parametrize("lookahead", [0, 1, 4])
def test_a_failure_is_raised_where_its_features_are_due(lookahead):
    """An exception in a background thread must not let the batch before be trained on again."""
    queue = FeatureQueue(Numbered(broken=2), lookahead, CPU)
    queue.announce(batches(4))
    assert [float(queue.next().context) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="batch 2 is lost"):
        queue.next()
    queue.close()
