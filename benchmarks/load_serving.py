"""Requests that arrive at a server, what they get, and when.

The clock of a `Service` runs only while its server works, and jumps to the next arrival when the server is idle. So
several services can take turns on one machine, each undisturbed by the others and by when its turn was.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Generic, Protocol, TypeVar

import numpy as np

from deepspec.decoding import Completion, Request, SpeculativeEngine

Item = TypeVar("Item")
Asked = TypeVar("Asked", contravariant=True)


class Server(Protocol[Asked]):
    """Decodes what is submitted, step by step."""

    def submit(self, request: Asked) -> int:
        """Let a request wait for a slot. Returns its number."""

    def step(self) -> tuple[float, list[tuple[int, Completion]]]:
        """Let waiting requests enter, or run a round. Returns the seconds that it took, and what has ended."""

    @property
    def written(self) -> int:
        """Output tokens of the requests in slots so far."""

    @property
    def passes(self) -> int:
        """Rounds of the whole batch so far."""


class EngineServer:
    """The engine on this machine, timed by the wall clock."""

    def __init__(self, engine: SpeculativeEngine):
        self._engine = engine

    def submit(self, request: Request) -> int:
        return self._engine.submit(request)

    def step(self) -> tuple[float, list[tuple[int, Completion]]]:
        started = time.perf_counter()
        ended = self._engine.step()
        return time.perf_counter() - started, ended

    @property
    def written(self) -> int:
        return self._engine.written

    @property
    def passes(self) -> int:
        return self._engine.timing.rounds


class Arrivals(Protocol):
    """When requests come, in seconds of the service's clock."""

    def due(self, now: float, inside: int) -> list[float]:
        """The arrival times of those that have come by `now` and were not returned yet, with `inside` being served."""

    def next(self) -> float:
        """When the next one comes if nothing happens before."""


class ClosedLoop:
    """A number of users; each sends a request as soon as the last one is answered."""

    def __init__(self, users: int):
        self.users = users

    def due(self, now: float, inside: int) -> list[float]:
        return [now] * (self.users - inside)

    def next(self) -> float:
        raise AssertionError("a closed loop is never idle")


class Poisson:
    """Requests that come independently of each other and of the answers."""

    def __init__(self, rate: float, seed: int):
        """Args: `rate`, requests per second."""
        self._rate = rate
        self._random = np.random.default_rng(seed)
        self._next = self._gap()

    def due(self, now: float, inside: int) -> list[float]:
        times = []
        while self._next <= now:
            times.append(self._next)
            self._next += self._gap()
        return times

    def next(self) -> float:
        return self._next

    def _gap(self) -> float:
        return float(self._random.exponential(1 / self._rate))


def in_turn(sets: Mapping[str, Sequence[Item]], seed: int) -> Iterator[Item]:
    """Endless: one of each set in turn, each set in a shuffled order over and over."""
    orders = []
    for name, items in sets.items():
        shuffled = list(items)
        random.Random(f"{seed} {name}").shuffle(shuffled)
        orders.append(cycle(shuffled))
    for order in cycle(orders):
        yield next(order)


@dataclass
class Slice:
    """What a service did in a stretch of its time. Tokens and time are those of the stretch; latencies and rounds are
    those of the requests that ended in it."""

    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    inside_seconds: float = 0.0  # summed over the requests being served, those that wait for a slot included
    latencies: list[float] = field(default_factory=list)  # from arrival to the last token
    lengths: list[int] = field(default_factory=list)  # output tokens, beside `latencies`
    rounds: int = 0  # of single requests
    proposed: int = 0  # drafted tokens verified in these
    emitted: int = 0  # output tokens that these gave


class Service(Generic[Item]):
    """A server, its arrivals, and the requests that come."""

    def __init__(self, server: Server[Item], arrivals: Arrivals, requests: Iterator[Item]):
        self.now = 0.0
        self._server, self._arrivals, self._requests = server, arrivals, requests
        self._arrived: dict[int, float] = {}  # number -> when, of those inside

    def serve(self, requests: int) -> Slice:
        """Go on until so many more requests have ended."""
        done = Slice()
        began, written, passes = self.now, self._server.written, self._server.passes
        while len(done.latencies) < requests:
            for at in self._arrivals.due(self.now, len(self._arrived)):
                self._arrived[self._server.submit(next(self._requests))] = at
            if not self._arrived:
                self.now = self._arrivals.next()
                continue
            seconds, ended = self._server.step()
            self.now += seconds
            done.inside_seconds += seconds * len(self._arrived)
            for number, completion in ended:
                self._book(done, self.now - self._arrived.pop(number), completion)
        done.seconds = self.now - began
        done.tokens = sum(done.lengths) + self._server.written - written
        done.passes = self._server.passes - passes
        return done

    def _book(self, done: Slice, latency: float, completion: Completion) -> None:
        done.latencies.append(latency)
        done.lengths.append(len(completion.output_ids))
        done.rounds += len(completion.rounds)
        done.proposed += sum(r.proposed for r in completion.rounds)
        done.emitted += sum(r.emitted for r in completion.rounds)
