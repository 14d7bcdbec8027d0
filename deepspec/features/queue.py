"""Features of the batches to come, computed beside the training step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch

from deepspec.data.packing import TokenBatch
from deepspec.features.source import FeatureSource
from deepspec.targets import TargetFeatures


class FeatureQueue:
    """Asks a source for the features of announced batches, in order, at most `lookahead` batches early.

    With a lookahead, background threads ask, as many as the source allows, on a CUDA device in a stream of their own.
    What fails there is raised by the `next` that would have returned its features.
    """

    def __init__(self, source: FeatureSource, lookahead: int, device: torch.device):
        self._source = source
        self._lookahead = lookahead
        self._waiting: deque[TokenBatch] = deque()
        self._begun: deque[Future[tuple[TargetFeatures, torch.cuda.Event | None]]] = deque()
        self._pool = ThreadPoolExecutor(source.concurrency, "features") if lookahead else None
        self._stream = torch.cuda.Stream(device) if lookahead and device.type == "cuda" else None

    def announce(self, batches: Iterable[TokenBatch]) -> None:
        """Batches that `next` will be called for, after those announced before."""
        self._waiting.extend(batches)

    def next(self) -> TargetFeatures:
        """Features of the oldest announced batch."""
        if self._pool is None:
            return self._source.batch_features(self._waiting.popleft())
        while self._waiting and len(self._begun) <= self._lookahead:
            self._begun.append(self._pool.submit(self._compute, self._waiting.popleft()))
        features, computed = self._begun.popleft().result()
        if computed is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(computed)
            for tensor in (features.context, features.final):
                tensor.record_stream(stream)  # its memory is not reused before this stream is done with it
        return features

    def close(self) -> None:
        """Close the source too; nothing is asked for afterwards."""
        self._source.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _compute(self, batch: TokenBatch) -> tuple[TargetFeatures, torch.cuda.Event | None]:
        in_stream: AbstractContextManager = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with in_stream:
            features = self._source.batch_features(batch)
            return features, None if self._stream is None else self._stream.record_event()
