"""The part of a feature server that computes: a bounded queue, and one thread that runs the target."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.data.packing import Document, TokenBatch
from deepspec.features.wire import FeatureAnswer, FeatureRequest
from deepspec.targets import Target

logger = logging.getLogger(__name__)

Answered = Future[FeatureAnswer]


class QueueFull(RuntimeError):
    """The request may be sent again later."""


class ShuttingDown(RuntimeError):
    """No more requests are taken."""


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    batch_tokens: int  # tokens of one forward pass, and so the largest request
    max_queue: int  # requests waiting
    merge_requests: bool  # documents of several requests in one forward pass


@dataclass
class Counts:
    """What was done so far."""

    requests: int = 0
    tokens: int = 0
    forward_passes: int = 0
    busy_seconds: float = 0.0


class FeatureEngine:
    """Answers requests in the order in which they came, several in one forward pass where they fit."""

    def __init__(self, target: Target, limits: Limits):
        self.target = target
        self.limits = limits
        self.counts = Counts()
        self._waiting: deque[tuple[FeatureRequest, Answered]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="target")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue, without those being computed."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        return not self._closing

    def submit(self, request: FeatureRequest) -> Answered:
        """Queue a request that `check_request` let pass; cancel the future to take it back while it waits.

        Raises:
            QueueFull, ShuttingDown: it is not taken.
        """
        answered: Answered = Future()
        with self._changed:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            if len(self._waiting) >= self.limits.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting, which is max_queue")
            self._waiting.append((request, answered))
            self._changed.notify()
        return answered

    def check_request(self, request: FeatureRequest) -> None:
        """Whether this target can answer it within the limits.

        Raises:
            ValueError: says what it asks too much.
        """
        if request.tokens > self.limits.batch_tokens:
            raise ValueError(
                f"the request has {request.tokens} tokens, but batch_tokens={self.limits.batch_tokens}: send fewer "
                "documents at once, or start the server with a larger batch_tokens"
            )
        layers = self.target.num_layers
        unknown = [layer_id for layer_id in request.layer_ids if not -1 <= layer_id < layers]
        if unknown or len(set(request.layer_ids)) < len(request.layer_ids):
            raise ValueError(f"layer_ids={list(request.layer_ids)}: must be different and lie in -1 to {layers - 1}")
        smallest, largest = int(request.input_ids.min()), int(request.input_ids.max())
        if smallest < 0 or largest >= self.target.vocab_size:
            raise ValueError(
                f"input_ids reach from {smallest} to {largest}, but {self.target.name_or_path} has "
                f"{self.target.vocab_size} tokens"
            )

    def stop_taking(self) -> None:
        """Refuse new requests and those that wait; the ones being computed are finished."""
        with self._changed:
            self._closing = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for _, answered in refused:
            if answered.set_running_or_notify_cancel():
                answered.set_exception(ShuttingDown("the server is shutting down"))

    def close(self) -> None:
        """Stop taking requests and wait for the thread."""
        self.stop_taking()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            started = time.perf_counter()
            self._answer(batch)
            self.counts.busy_seconds += time.perf_counter() - started

    def _next_batch(self) -> list[tuple[FeatureRequest, Answered]]:
        """The oldest requests that make one forward pass; empty at the end."""
        batch: list[tuple[FeatureRequest, Answered]] = []
        with self._changed:
            while not batch:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return []
                while self._waiting and self._fits(batch, self._waiting[0][0]):
                    request, answered = self._waiting.popleft()
                    if answered.set_running_or_notify_cancel():
                        batch.append((request, answered))
        return batch

    def _fits(self, batch: Sequence[tuple[FeatureRequest, Answered]], request: FeatureRequest) -> bool:
        if not batch:
            return True
        tokens = sum(taken.tokens for taken, _ in batch) + request.tokens
        same_layers = request.layer_ids == batch[0][0].layer_ids
        return self.limits.merge_requests and same_layers and tokens <= self.limits.batch_tokens

    def _answer(self, batch: Sequence[tuple[FeatureRequest, Answered]]) -> None:
        """A failure fails its own request alone: what failed together is tried one by one."""
        try:
            answers = self._compute([request for request, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for pair in batch:
                    self._answer([pair])
            else:
                logger.exception("a request of %d tokens failed", batch[0][0].tokens)
                batch[0][1].set_exception(error)
            return
        for (_, answered), answer in zip(batch, answers, strict=True):
            answered.set_result(answer)

    def _compute(self, requests: Sequence[FeatureRequest]) -> list[FeatureAnswer]:
        batch = row_of_documents(requests)
        features = self.target.features(batch.to(self.target.device), requests[0].layer_ids)
        answers, start = [], 0
        for request in requests:
            places = request.final_places.long().to(features.final.device) + start
            context = features.context[0, start : start + request.tokens]
            answers.append(
                FeatureAnswer(
                    context=_to_host(context.to(request.dtype)),
                    final=_to_host(features.final[0, places].to(request.dtype)),
                    fingerprint=self.target.fingerprint,
                    request_id=request.id,
                )
            )
            start += request.tokens
        self.counts.requests += len(requests)
        self.counts.tokens += start
        self.counts.forward_passes += 1
        return answers


def _to_host(tensor: Tensor) -> Tensor:
    """From a GPU through pinned memory, which PyTorch keeps for the next answer: several times as fast as without."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def row_of_documents(requests: Sequence[FeatureRequest]) -> TokenBatch:
    """All documents of all requests in one row."""
    input_ids = torch.cat([request.input_ids for request in requests]).long()[None]
    lengths = [length for request in requests for length in request.lengths]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    documents = [Document(i, 0, start, length) for i, (start, length) in enumerate(zip(starts, lengths, strict=False))]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return TokenBatch(input_ids, position_ids, torch.zeros_like(input_ids, dtype=torch.bool), tuple(documents))
