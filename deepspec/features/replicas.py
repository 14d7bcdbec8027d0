"""The servers that a trainer asks: connections that stay open, the least busy server first, patience with failures."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakSet

import torch
import urllib3
from torch import Tensor
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
CONNECT_SECONDS = 10.0
FIRST_REST, LONGEST_REST = 0.2, 15.0  # seconds that a server is left alone after a failure, doubled with each
CHUNK = 1 << 20  # bytes read from the socket at once
BUSY = (502, 503, 504)


class FeatureServerError(DataError):
    """No server gave the features: training cannot go on, and goes on later from its newest checkpoint."""


class Unavailable(Exception):
    """A server failed in a way that may pass."""

    def __init__(self, cause: str, rest: float | None = None):
        super().__init__(cause)
        self.rest = rest  # seconds, if the server said so


@dataclass
class Replica:
    """One server."""

    url: str
    under_way: int = 0  # requests
    failures: int = 0  # since it answered last
    rests_until: float = 0.0  # monotonic seconds
    last_failure: str = "not asked yet"


class Replicas:
    """Asks one of several servers that all give the same answer; safe to use from several threads."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        retry_for: float,
        token: str | None = None,
        pin_memory: bool = False,
    ):
        """
        Args:
            timeout: seconds for one request.
            retry_for: seconds for which a request is tried again, on every server in turn.
            token: sent as bearer token.
            pin_memory: answers land in pinned memory.
        """
        self.replicas = [Replica(url.rstrip("/")) for url in urls]
        self._timeout = timeout
        self._retry_for = retry_for
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._pin_memory = pin_memory
        self._http = _remembering_pools(self._remember)
        self._lock = threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._stopped = threading.Event()
        self._why_stopped = "the feature source was closed"

    def __len__(self) -> int:
        return len(self.replicas)

    def ask(
        self,
        method: str,
        path: str,
        read: Callable[[Replica, Tensor], Result],
        *,
        body: Sequence[memoryview] = (),
        content_type: str = "application/json",
        only: Replica | None = None,
    ) -> Result:
        """Send a request until a server answers it, and return `read(server, answer)`, the answer as uint8 [bytes].

        Args:
            read: may raise `Unavailable` for an answer that is no good.
            only: ask this server and no other.

        Raises:
            FeatureServerError: none answered within retry_for, or this was closed.
            ConfigError: a server says that the request is wrong.
        """
        give_up_at = time.monotonic() + self._retry_for
        while True:
            replica = only or self._choose()
            self.pause(min(replica.rests_until, give_up_at) - time.monotonic())
            try:
                with self._counted(replica):
                    answer = read(replica, self._send(replica, method, path, body, content_type))
            except Unavailable as error:
                self.pause(0)
                self._note_failure(replica, error)
                left = give_up_at - time.monotonic()
                logger.warning("%s: %s; trying again for at most %.0f s", replica.url, error, max(left, 0))
                if left <= 0:
                    raise self._give_up(only) from error
                continue
            replica.failures = 0
            return answer

    def pause(self, seconds: float) -> None:
        """Do nothing for so long. Raises FeatureServerError as soon as this is closed."""
        if self._stopped.wait(max(seconds, 0)):
            raise FeatureServerError(self._why_stopped)

    def close(self) -> None:
        """Requests fail at once, those too that a server has and does not answer."""
        self._stopped.set()
        with self._lock:
            for connected in self._sockets:
                _hang_up(connected)
        self._http.clear()

    def _remember(self, connected: socket.socket) -> None:
        with self._lock:
            self._sockets.add(connected)
            if self._stopped.is_set():
                _hang_up(connected)

    def _choose(self) -> Replica:
        """The least busy of those that do not rest; if all rest, the one that is ready first."""
        now = time.monotonic()
        with self._lock:
            awake = [replica for replica in self.replicas if replica.rests_until <= now]
            if awake:
                return min(awake, key=lambda replica: replica.under_way)
            return min(self.replicas, key=lambda replica: replica.rests_until)

    @contextmanager
    def _counted(self, replica: Replica) -> Iterator[None]:
        with self._lock:
            replica.under_way += 1
        try:
            yield
        finally:
            with self._lock:
                replica.under_way -= 1

    def _note_failure(self, replica: Replica, error: Unavailable) -> None:
        with self._lock:
            rest = min(FIRST_REST * 2**replica.failures, LONGEST_REST) * random.uniform(0.5, 1)
            replica.failures += 1
            replica.rests_until = time.monotonic() + (rest if error.rest is None else error.rest)
            replica.last_failure = str(error)

    def _give_up(self, only: Replica | None) -> FeatureServerError:
        """Whatever else is asked for fails at once, and for the same reason."""
        asked = [only] if only else self.replicas
        causes = "; ".join(f"{replica.url}: {replica.last_failure}" for replica in asked)
        self._why_stopped = (
            f"no feature server of features.urls answered for {self._retry_for:g} s (features.retry_for): {causes}. "
            "Start one again and run the same command: training continues from its newest checkpoint"
        )
        self._stopped.set()
        return FeatureServerError(self._why_stopped)

    def _send(self, replica: Replica, method: str, path: str, body: Sequence[memoryview], content_type: str) -> Tensor:
        """One request: the body of a 200, uint8 [bytes]."""
        deadline = time.monotonic() + self._timeout
        try:
            response = self._http.request(
                method,
                replica.url + path,
                body=b"".join(body),
                headers=self._headers | {"Content-Type": content_type},
                preload_content=False,
                timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, self._timeout), read=self._timeout),
            )
            try:
                answer = self._read(response, deadline)
            except BaseException:
                response.close()
                raise
            response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        if response.status == 200:
            return answer
        message = _message(answer)
        if response.status >= 500:
            rest = response.headers.get("Retry-After", "") if response.status in BUSY else ""
            raise Unavailable(f"{response.status}: {message}", float(rest) if rest.isdecimal() else None)
        raise ConfigError(f"features.urls: {replica.url}{path} answered {response.status}: {message}")

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> Tensor:
        """All of the body, straight into its place."""
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal():
            return torch.frombuffer(bytearray(response.read() or b"\n"), dtype=torch.uint8)
        buffer = torch.empty(int(length), dtype=torch.uint8, pin_memory=self._pin_memory)
        view, start = buffer.numpy().data, 0
        while start < len(view):
            if time.monotonic() > deadline:
                raise Unavailable(f"sent {start} of {length} bytes in {self._timeout:g} s (features.timeout)")
            count = response.readinto(view[start : start + CHUNK])
            if not count:
                raise Unavailable(f"broke off after {start} of {length} bytes")
            start += count
        return buffer


def _remembering_pools(remember: Callable[[socket.socket], None]) -> urllib3.PoolManager:
    """Connection pools that tell of every socket they open."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            remember(self.sock)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            remember(self.sock)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    manager = urllib3.PoolManager(maxsize=64, retries=False)
    manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    return manager


def _hang_up(connected: socket.socket) -> None:
    """Whoever reads or writes there, in whatever thread, is told that the connection is over."""
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # under TLS without its farewell, which would wait


def _message(answer: Tensor) -> str:
    text = bytes(answer[:2000].numpy()).decode(errors="replace").strip()
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text
