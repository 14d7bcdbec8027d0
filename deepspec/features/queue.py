"""Features of the batches to come, computed beside the training step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext

import torch

from deepspec.data.packing import TokenBatch
from deepspec.features.source import FeatureSource
from deepspec.targets import TargetFeatures

Computed = tuple[TargetFeatures, torch.cuda.Event | None]
POLL = 0.2  # seconds between two looks at whether the run is told to stop


class StoppedWaiting(Exception):
    """The run was told to stop while it waited for features."""


class FeatureQueue:
    """Asks a source for the features of announced batches, in order, at most `lookahead` batches early.

    With a lookahead, and where the source is remote, background threads ask, as many as the source allows; with a
    lookahead on a CUDA device in a stream of their own. What fails there is raised by the `next` that would have
    returned its features.
    """

    def __init__(
        self,
        source: FeatureSource,
        lookahead: int,
        device: torch.device,
        *,
        is_stopped: Callable[[], bool] = lambda: False,
        on_any_rank: Callable[[bool], bool] = bool,
    ):
        """
        Args:
            is_stopped: whether this process was told to stop; it then no longer waits for a remote source.
            on_any_rank: whether something holds on one of the ranks, which all ask for as many features. They give up
                together: the others would wait for this one in the next collective.
        """
        self._source = source
        self._is_stopped = is_stopped
        self._on_any_rank = on_any_rank
        self._lookahead = lookahead
        self._waiting: deque[TokenBatch] = deque()
        self._begun: deque[Future[Computed]] = deque()
        self._pool = ThreadPoolExecutor(source.concurrency, "features") if lookahead or source.is_remote else None
        self._stream = torch.cuda.Stream(device) if lookahead and device.type == "cuda" else None

    def announce(self, batches: Iterable[TokenBatch]) -> None:
        """Batches that `next` will be called for, after those announced before."""
        self._waiting.extend(batches)

    def next(self) -> TargetFeatures:
        """Features of the oldest announced batch.

        Raises:
            StoppedWaiting: on every rank, when one of them is stopped and its remote source has no answer yet.
        """
        if self._pool is None:
            return self._source.batch_features(self._waiting.popleft())
        while self._waiting and len(self._begun) <= self._lookahead:
            self._begun.append(self._pool.submit(self._compute, self._waiting.popleft()))
        return self._received(self._begun.popleft())

    def out_of_turn(self, batch: TokenBatch) -> TargetFeatures:
        """Features of a batch that was not announced. Raises StoppedWaiting as `next` does."""
        if self._pool is None or not self._source.is_remote:
            return self._source.batch_features(batch)
        return self._received(self._pool.submit(self._compute, batch))

    def close(self) -> None:
        """Close the source too; nothing is asked for afterwards."""
        self._source.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _received(self, future: Future[Computed]) -> TargetFeatures:
        if self._source.is_remote and self._on_any_rank(not self._is_there(future)):
            raise StoppedWaiting
        features, computed = future.result()
        if computed is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(computed)
            for tensor in (features.context, features.final):
                tensor.record_stream(stream)  # its memory is not reused before this stream is done with it
        return features

    def _is_there(self, future: Future[Computed]) -> bool:
        """Wait for it, unless the run is stopped."""
        while not wait([future], POLL).done:
            if self._is_stopped():
                return False
        return True

    def _compute(self, batch: TokenBatch) -> Computed:
        in_stream: AbstractContextManager = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with in_stream:
            features = self._source.batch_features(batch)
            return features, None if self._stream is None else self._stream.record_event()
