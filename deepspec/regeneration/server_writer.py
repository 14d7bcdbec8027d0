"""The target writes on servers: an event loop in a thread, httpx, and the queue of `deepspec.regeneration.servers`."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx

from deepspec.config import ConfigError, near_match
from deepspec.regeneration.openai_api import (
    CHAT,
    COMPLETIONS,
    MODELS,
    BadAnswer,
    chat_body,
    completion_body,
    error_message,
    names_of,
    read_chat,
    read_completion,
    read_models,
)
from deepspec.regeneration.options import WritingOptions
from deepspec.regeneration.servers import Refused, Server, Servers, Unavailable
from deepspec.regeneration.writer import Answer, Outcome, Question

if TYPE_CHECKING:
    from deepspec.regeneration.setup import Speaker

TOKEN_VARIABLE = "OPENAI_API_KEY"  # sent as bearer token, as the OpenAI client does
CONNECT_SECONDS, WAIT_SECONDS = 10.0, 0.2
AHEAD = 2  # questions that are ready, for each request that may be under way
NO_ROUTE = (404, 405, 501)
PASSES = (408, 409, 425, 429)  # answers below 500 that a server gives when it is busy


class ServerWriter:
    """Servers with the OpenAI API; each gets as many questions as it can answer."""

    def __init__(self, options: WritingOptions, speaker: Speaker, say: Callable[[str], None]):
        urls = dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in options.urls)
        self.limit = min(options.max_length or speaker.positions, speaker.positions)
        self._options, self._speaker, self._say = options, speaker, say
        self._most = AHEAD * options.concurrency * len(urls)
        self._results: queue.Queue[Outcome] = queue.Queue()
        self._outstanding = 0
        self._failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._servers = Servers(
            urls,
            connect=self._connect,
            ask=self._ask,
            deliver=lambda question, outcome: self._results.put((question, outcome)),
            concurrency=options.concurrency,
            retries=options.retries,
            retry_for=options.retry_for,
        )
        self._thread = threading.Thread(target=self._run, name="servers", daemon=True)
        self._main: asyncio.Task[None] | None = None
        self._started = threading.Event()
        self._thread.start()
        self._started.wait()

    @property
    def room(self) -> int:
        return self._most - self._outstanding

    @property
    def in_flight(self) -> int:
        return self._servers.under_way

    @property
    def tokens_under_way(self) -> int:
        return 0

    def put(self, question: Question) -> None:
        self._outstanding += 1
        put = self._servers.put(question)
        try:
            asyncio.run_coroutine_threadsafe(put, self._loop)
        except RuntimeError:  # the loop has ended; `wait` says why
            put.close()

    def wait(self) -> list[Outcome]:
        outcomes = []
        with suppress(queue.Empty):
            outcomes.append(self._results.get(timeout=WAIT_SECONDS))
            while True:
                outcomes.append(self._results.get_nowait())
        self._outstanding -= len(outcomes)
        if not outcomes and self._failure is not None:
            raise self._failure
        return outcomes

    def close(self) -> None:
        if self._main and self._thread.is_alive():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._work())
        self._loop.call_soon(self._started.set)
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            self._failure = group.exceptions[0]
        except BaseException as error:
            self._failure = error
        finally:
            self._loop.close()

    async def _work(self) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=min(CONNECT_SECONDS, self._options.timeout))
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout) as self._client:
            await self._servers.run()

    async def _connect(self, server: Server) -> None:
        """Which model it has."""
        answer = await self._send("GET", server.url + MODELS, seconds=min(CONNECT_SECONDS, self._options.timeout))
        if answer.status_code in NO_ROUTE:
            if self._options.model is None:
                raise ConfigError(f"urls: {server.url} has no {MODELS} to ask; give the name there with model=NAME")
            server.model = self._options.model
            return
        self._check_status(server, answer)
        try:
            models = read_models(answer.content)
        except BadAnswer as error:
            raise Unavailable(f"{MODELS}: {error}") from error
        names = names_of(models)
        wanted = self._options.model
        if wanted is None and len(models) != 1:
            raise ConfigError(f"urls: {server.url} has the models {', '.join(names) or 'none'}; choose with model=NAME")
        if wanted is not None and wanted not in names:
            await self._check_adapter(server, answer, wanted, names)
        server.model = wanted or names[0]
        server.positions = dict(models).get(server.model)

    async def _check_adapter(self, server: Server, answer: httpx.Response, wanted: str, names: list[str]) -> None:
        """Raises ConfigError where the model is no adapter either."""
        everything = [str(model.get("id")) for model in answer.json()["data"]]
        if wanted not in everything:
            raise ConfigError(
                f"model={wanted}: {server.url} does not have it; it has {', '.join(everything)}."
                f"{near_match(wanted, names)}"
            )

    async def _ask(self, server: Server, question: Question) -> Answer:
        positions = min(self.limit, server.positions or self.limit)
        most = min(question.max_new_tokens, positions - len(question.prompt_ids))
        if most < 1:
            length = len(question.prompt_ids)
            raise Refused(f"a prompt of {length} tokens; {server.url} has {positions} positions", is_certain=True)
        sampling = self._options.sampling
        if not server.only_chats:
            body = completion_body(question, sampling, server.model, most)
            answer = await self._send("POST", server.url + COMPLETIONS, body)
            if answer.status_code not in NO_ROUTE or _tells_of_model(answer, server.model):
                self._check_status(server, answer)
                return self._read(lambda: read_completion(answer.content, question, self._speaker.tokenizer))
            self._fall_back(server, question)
        body = chat_body(question, sampling, server.model, most, dict(self._speaker.template_options))
        answer = await self._send("POST", server.url + CHAT, body)
        self._check_status(server, answer)
        return self._read(lambda: read_chat(answer.content))

    def _fall_back(self, server: Server, question: Question) -> None:
        if question.messages is None:
            raise ConfigError(f"urls: {server.url} has no {COMPLETIONS}, which is needed to begin a user's turn")
        if not server.only_chats:
            server.only_chats = True
            template = f", not with chat_template={self._options.chat_template}" if self._options.chat_template else ""
            self._say(
                f"{server.url} has no {COMPLETIONS}: asking {CHAT}; it renders prompts itself{template}, and the exact "
                "text (raw) is not known"
            )

    @staticmethod
    def _read(read: Callable[[], Answer]) -> Answer:
        try:
            return read()
        except BadAnswer as error:
            raise Unavailable(f"an answer that cannot be used: {error}") from error

    async def _send(
        self, method: str, url: str, body: dict | None = None, seconds: float | None = None
    ) -> httpx.Response:
        """Raises Unavailable where no answer comes."""
        seconds = seconds or self._options.timeout
        try:
            async with asyncio.timeout(seconds):
                return await self._client.request(method, url, json=body)
        except TimeoutError as error:
            raise Unavailable(f"no answer in {seconds:g} s (timeout)") from error
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL) as error:
            raise Unavailable(f"{type(error).__name__}: {error}", blames_question=False) from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error

    def _check_status(self, server: Server, answer: httpx.Response) -> None:
        """Raises ConfigError, Refused or Unavailable for everything but a 200."""
        status = answer.status_code
        if status == 200:
            return
        message = f"{status}: {error_message(answer.content)}"
        if status in (401, 403):
            raise ConfigError(
                f"urls: {server.url} answered {message}; set {TOKEN_VARIABLE} in the environment to the key that it "
                "takes"
            )
        if status == 404 and server.model:
            raise ConfigError(f"model={server.model}: {server.url} answered {message}")
        if 400 <= status < 500 and status not in PASSES:
            raise Refused(f"{server.url} answered {message}")
        after = answer.headers.get("Retry-After", "")
        raise Unavailable(
            message, rest=float(after) if after.isdecimal() else None, blames_question=status not in (*PASSES, 502, 503)
        )


def _tells_of_model(answer: httpx.Response, model: str) -> bool:
    """Whether a 404 is about the model and not about the route."""
    message = error_message(answer.content).lower()
    return answer.status_code == 404 and "model" in message and (model.lower() in message or "not exist" in message)
