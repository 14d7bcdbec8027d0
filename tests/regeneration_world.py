"""Prompts, answers without a model, and a stand-in for servers with the OpenAI API that can fail in many ways."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feature_servers import QuietHandler, answering

from deepspec.regeneration.regenerate import RegenerateOptions
from deepspec.regeneration.setup import TargetOptions

END = "<|im_end|>"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write_prompts(path: Path, count: int, start: int = 0) -> str:
    """Rows of one question each: row0, row1, ..."""
    rows = [{"id": f"row{i}", "messages": [user(f"What is {i} + {i + 1}?")]} for i in range(start, start + count)]
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def options_for(world: Path, output_dir: Path, prompts: list[str], **changes: Any) -> RegenerateOptions:
    settings: dict[str, Any] = {"max_new_tokens": 12, "max_length": 128, "batch_size": 4}
    target = TargetOptions(path=str(world / "target"))
    return RegenerateOptions(target=target, output_dir=str(output_dir), prompts=prompts, **(settings | changes))


def saved_rows(folder: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def left_out(folder: Path) -> list[dict[str, Any]]:
    return saved_rows(folder / ".regenerate")


@dataclass
class StandIn:
    """What a server does with its requests. `misbehave(number, body)` may name a way to fail, for one request."""

    misbehave: Callable[[int, dict[str, Any]], str | None] = lambda number, body: None
    seconds: float = 0.0
    models: tuple[str, ...] = ("tiny",)
    positions: int = 4096
    chat_only: bool = False
    text_of: Callable[[dict[str, Any]], str] = lambda body: f"The seed is {body['seed']}.{END}"
    message_of: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {"content": f"Seed {body['seed']}."}
    finish_reason: str | None = None  # None = stop where the text has an end
    key: str | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_under_way: int = 0
    gate: threading.Event = field(default_factory=threading.Event)  # what stalls goes on when it is set
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator[StandIn]:
        stand_in = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                if not stand_in.authorised(self):
                    return
                models = [{"id": name, "max_model_len": stand_in.positions} for name in stand_in.models]
                send(self, 200, {"data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if stand_in.authorised(self):
                    stand_in.answer(self, body)

        with answering(Handler) as self.url:
            try:
                yield self
            finally:
                self.gate.set()

    def authorised(self, handler: QuietHandler) -> bool:
        if self.key is None or handler.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        send(handler, 401, {"error": "Unauthorized"})
        return False

    def answer(self, handler: QuietHandler, body: dict[str, Any]) -> None:
        is_chat = handler.path == "/v1/chat/completions"
        if self.chat_only and not is_chat:
            send(handler, 404, {"detail": "Not Found"})
            return
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            time.sleep(self.seconds)
            self._answer(handler, body, is_chat, self.misbehave(number, body))
        finally:
            with self.lock:
                self.under_way -= 1

    def _answer(self, handler: QuietHandler, body: dict[str, Any], is_chat: bool, failure: str | None) -> None:
        if failure == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
        elif failure == "stall":
            self.gate.wait(30)
            handler.close_connection = True
        elif failure == "garbage":
            send(handler, 200, {"choices": "none"})
        elif failure == "half":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.close_connection = True
        elif failure == "unknown model":
            send(handler, 404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        elif failure:
            send(handler, int(failure), {"error": {"message": f"so says {failure}"}})
        elif is_chat:
            choice = {"message": {"role": "assistant", **self.message_of(body)}, "finish_reason": "stop"}
            send(handler, 200, {"choices": [choice], "usage": {"completion_tokens": 5}})
        else:
            text = self.text_of(body)
            reason = self.finish_reason or ("stop" if text.endswith(END) else "length")
            choice = {"text": text, "finish_reason": reason}
            send(handler, 200, {"choices": [choice], "usage": {"completion_tokens": 5}})


def send(handler: QuietHandler, status: int, answer: Any) -> None:
    content = json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


class Scripted:
    """A writer that answers with given texts, the last question first."""

    limit = 1000
    in_flight = tokens_under_way = 0

    def __init__(self, texts: Callable[[Any], Any], room: int = 3):
        self._texts, self._most = texts, room
        self.asked: deque[Any] = deque()
        self.questions: list[Any] = []

    @property
    def room(self) -> int:
        return self._most - len(self.asked)

    def put(self, question: Any) -> None:
        self.asked.append(question)
        self.questions.append(question)

    def wait(self) -> list[Any]:
        question = self.asked.pop()
        return [(question, self._texts(question))]

    def close(self) -> None:
        pass
