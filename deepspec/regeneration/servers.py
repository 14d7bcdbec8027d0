"""Several servers that share one queue: each takes questions as fast as it answers, and what one fails at another gets.

Runs in an event loop. A server that fails rests, longer each time, and is then tried with one request; a question that
fails goes back to the front of the queue, for another server if there is one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from deepspec.config import ConfigError
from deepspec.regeneration.writer import Answer, Question, Refusal, WriterError

FIRST_REST, LONGEST_REST = 0.2, 15.0  # seconds that a server is left alone after a failure, doubled with each
LOOKS = 0.05  # seconds between two looks at the servers
REFUSED_AT_FIRST = 8  # questions: if the first ones are all refused, the fault is not theirs


class Unavailable(Exception):
    """A server failed in a way that may pass."""

    def __init__(self, cause: str, *, rest: float | None = None, blames_question: bool = True):
        super().__init__(cause)
        self.rest = rest  # seconds, if the server said so
        self.blames_question = blames_question  # whether the question may be the reason


class Refused(Exception):
    """This question cannot be answered."""

    def __init__(self, reason: str, *, is_certain: bool = False):
        super().__init__(reason)
        self.is_certain = is_certain  # else a server says so, which may not understand the requests at all


@dataclass
class Server:
    """One server."""

    url: str
    model: str = ""
    positions: int | None = None  # None = not known
    is_known: bool = False  # whether it has said which models it has
    only_chats: bool = False
    under_way: int = 0
    failures: int = 0  # since it answered last
    failing_since: float | None = None  # monotonic seconds; None = it answers
    last_failure_at: float = 0.0
    rests_until: float = 0.0
    last_failure: str = ""
    answered: int = 0


@dataclass(eq=False)
class Entry:
    """A question on its way."""

    question: Question
    failures: int = 0  # for which it may be the reason
    failed_on: set[str] = field(default_factory=set)
    last_cause: str = ""


class Servers:
    """Hands questions out to servers and failed ones on to others."""

    def __init__(
        self,
        urls: Iterable[str],
        *,
        connect: Callable[[Server], Awaitable[None]],
        ask: Callable[[Server, Question], Awaitable[Answer]],
        deliver: Callable[[Question, Answer | Refusal], None],
        concurrency: int,
        retries: int,
        retry_for: float,
    ):
        """
        Args:
            connect: finds out what a server has; ask: one request. They raise Unavailable, Refused or ConfigError.
            deliver: is given what has ended.
        """
        self.servers = [Server(url) for url in urls]
        self._connect, self._ask, self._deliver = connect, ask, deliver
        self._concurrency, self._retries, self._retry_for = concurrency, retries, retry_for
        self._queue: deque[Entry] = deque()
        self._outstanding: set[Entry] = set()
        self._changed = asyncio.Condition()
        self._refused: list[tuple[Entry, Refusal]] = []  # before anything was answered

    @property
    def under_way(self) -> int:
        return sum(server.under_way for server in self.servers)

    async def put(self, question: Question) -> None:
        entry = Entry(question)
        self._outstanding.add(entry)
        await self._enqueue(entry)

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            WriterError: no server has answered for `retry_for` seconds.
            ConfigError: a server says that nothing of this can work.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            for server in self.servers:
                group.create_task(self._serve(server, group))

    async def _serve(self, server: Server, group: asyncio.TaskGroup) -> None:
        while True:
            if (rest := server.rests_until - time.monotonic()) > 0:
                await asyncio.sleep(rest)
            elif not server.is_known:
                await self._get_to_know(server)
            else:
                entry = await self._next_for(server)
                server.under_way += 1
                group.create_task(self._answer(server, entry))

    async def _get_to_know(self, server: Server) -> None:
        started = time.monotonic()
        try:
            await self._connect(server)
            server.is_known = True
        except Unavailable as error:
            self._note_failure(server, error, started)

    async def _next_for(self, server: Server) -> Entry:
        """Wait until the server may take a question and there is one for it."""
        async with self._changed:
            while True:
                if server.rests_until <= time.monotonic() and server.under_way < self._limit_of(server):
                    entry = self._pick(server)
                    if entry is not None:
                        self._queue.remove(entry)
                        return entry
                await self._changed.wait()

    def _has_room(self, server: Server) -> bool:
        return not server.failures and server.is_known and server.under_way < self._concurrency

    def _limit_of(self, server: Server) -> int:
        return 1 if server.failures else self._concurrency

    def _pick(self, server: Server) -> Entry | None:
        """The first question that did not fail here, unless no other server could take it."""
        others = {other.url for other in self.servers if other is not server and self._has_room(other)}
        return next(
            (entry for entry in self._queue if server.url not in entry.failed_on or not others - entry.failed_on), None
        )

    async def _answer(self, server: Server, entry: Entry) -> None:
        started = time.monotonic()
        try:
            answer = await self._ask(server, entry.question)
        except Unavailable as error:
            self._note_failure(server, error, started)
            await self._again(server, entry, error)
        except Refused as error:
            self._note_success(server)
            self._refuse(entry, Refusal(str(error)), is_certain=error.is_certain)
        else:
            self._note_success(server)
            server.answered += 1
            self._end(entry, answer)
            self._release_refused()
        finally:
            server.under_way -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _again(self, server: Server, entry: Entry, error: Unavailable) -> None:
        entry.failed_on.add(server.url)
        entry.failures += error.blames_question
        entry.last_cause = f"{server.url}: {error}"
        await self._enqueue(entry, first=True)

    async def _enqueue(self, entry: Entry, *, first: bool = False) -> None:
        async with self._changed:
            (self._queue.appendleft if first else self._queue.append)(entry)
            self._changed.notify_all()

    async def _watch(self) -> None:
        """Wake who rests, let go of questions that always fail, and end where nobody answers."""
        while True:
            await asyncio.sleep(LOOKS)
            async with self._changed:
                self._changed.notify_all()
            self._let_go_of_bad_questions()
            if len(self._refused) == len(self._outstanding):
                self._release_refused()  # nothing else is asked that could tell
            since = [server.failing_since for server in self.servers]
            failing = [moment for moment in since if moment is not None]
            if len(failing) == len(since) and time.monotonic() - max(failing) >= self._retry_for:
                causes = "; ".join(f"{server.url}: {server.last_failure}" for server in self.servers)
                raise WriterError(
                    f"no server of urls answered for {self._retry_for:g} s (retry_for): {causes}. Start one again and "
                    "run the same command: what is finished is kept"
                )

    def _let_go_of_bad_questions(self) -> None:
        """A question that failed often enough while others were answered is left for another run."""
        if not any(server.answered for server in self.servers):
            return
        bad = [entry for entry in self._queue if entry.failures >= self._retries]
        is_healthy = any(not server.failures for server in self.servers)
        for entry in bad if is_healthy or len(bad) == len(self._outstanding) else []:
            self._queue.remove(entry)
            self._end(entry, Refusal(f"failed {entry.failures} times; {entry.last_cause}", is_final=False))

    def _refuse(self, entry: Entry, refusal: Refusal, *, is_certain: bool) -> None:
        """Refusals wait for the first answer: if everything is refused, the fault is not the questions'."""
        if is_certain or any(server.answered for server in self.servers):
            self._end(entry, refusal)
            return
        self._refused.append((entry, refusal))
        if len(self._refused) >= REFUSED_AT_FIRST:
            raise ConfigError(f"urls: the first {REFUSED_AT_FIRST} requests were all refused: {refusal.reason}")

    def _release_refused(self) -> None:
        for entry, refusal in self._refused:
            self._end(entry, refusal)
        self._refused.clear()

    def _end(self, entry: Entry, outcome: Answer | Refusal) -> None:
        self._outstanding.discard(entry)
        self._deliver(entry.question, outcome)

    def _note_failure(self, server: Server, error: Unavailable, started: float) -> None:
        now = time.monotonic()
        server.last_failure = str(error)
        if server.failing_since is None:
            server.failing_since = now
        if started >= server.last_failure_at:  # else it is one of many that failed together
            rest = min(FIRST_REST * 2**server.failures, LONGEST_REST) * random.uniform(0.5, 1)
            server.failures += 1
            server.rests_until = now + (rest if error.rest is None else error.rest)
            server.last_failure_at = now

    @staticmethod
    def _note_success(server: Server) -> None:
        server.failures, server.failing_since = 0, None
