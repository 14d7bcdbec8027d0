"""What an OpenAI-compatible server answered, from response bodies as they are logged: whole, or streamed in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from deepspec.data.conversation import Message
from deepspec.data.jsonl import RowError
from deepspec.data.turns import messages_of

KEPT = ("role", "content", "reasoning_content", "tool_calls", "function_call")  # of a message; null ones are dropped
CUT_REASONS = ("length", "max_tokens", "max_output_tokens", "model_length", "abort", "aborted")
LINE = re.compile(r"\r\n|\r|\n")  # of a stream; text may hold what else counts as a line break
FAILURES = ("error", "failed", "cancelled")
COMPLETED_EVENTS = ("response.completed", "response.incomplete", "response.failed")


class Unusable(Exception):
    """A request that was served in a way that teaches nothing. The message is the reason, for counting."""


@dataclass(frozen=True)
class Answer:
    """One choice of a response."""

    message: Message  # of the assistant
    finish_reason: str | None  # None: it never ended
    choice: int = 0
    stop_string: bool | None = None  # whether it ended at one, so without an end-of-turn token; None = not said
    model: str | None = None
    id: str | None = None  # of the response


def answers_of(place: str, body: Any, on_unusable: Callable[[str], None]) -> list[Answer]:
    """The answers in a response body.

    Args:
        body: of /v1/chat/completions or /v1/responses: a dictionary, its JSON text, or of a stream the list of chunks
            or the text of `data: {...}` lines. Also a bare assistant message, or a text, which nothing says has ended.
        on_unusable: told why of a choice that cannot be used.

    Raises:
        Unusable: the request failed.
        RowError: it is none of these.
    """
    if isinstance(body, str):
        body = _parsed(body)
    if isinstance(body, list):
        body = _of_list(body)
    if isinstance(body, str):
        body = {"role": "assistant", "content": body}
    if not isinstance(body, dict):
        raise RowError(f"{place}: the response is {type(body).__name__}, expected the body that the server sent")
    if body.get("error") or body.get("status") in FAILURES:
        raise Unusable("errors")
    usable = []
    for answer in _choices(place, body):
        answer = replace(answer, model=body.get("model"), id=body.get("id"))
        try:
            usable.append(replace(answer, message=_checked(place, answer)))
        except Unusable as reason:
            on_unusable(str(reason))
    return usable


def _parsed(text: str) -> Any:
    """JSON, the chunks of a stream, or else the text itself."""
    start = text.lstrip()
    if start.startswith(("data:", "event:", ":")):
        return list(_events(LINE.split(start)))
    if start[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The chunks of `data:` lines. A torn one ends the stream."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or not data:
            continue
        try:
            event = json.loads(data)
        except ValueError:  # [DONE], or the line where the connection broke
            return
        if isinstance(event, dict):
            yield event


def _of_list(parts: list[Any]) -> Any:
    """The body that a list of chunks, of lines or of messages amounts to."""
    if parts and all(isinstance(part, str) for part in parts):
        parts = list(_events(line for part in parts for line in LINE.split(part)))
    dictionaries = [part for part in parts if isinstance(part, dict)]
    if failed := next((part for part in dictionaries if part.get("error")), None):
        return failed
    if whole := next((part for part in dictionaries if part.get("type") in COMPLETED_EVENTS), None):
        return whole.get("response")
    if any("choices" in part for part in dictionaries):
        return joined(dictionaries)
    written = [part for part in dictionaries if part.get("role") == "assistant"]
    return written[-1] if written else {}


@dataclass
class _Piecewise:
    """A choice of a stream so far."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {"content": [], "reasoning_content": []})
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)  # finish_reason, stop_reason

    def add(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        for name, given in (("content", delta.get("content")), ("reasoning_content", _reasoning(delta))):
            if isinstance(given, str):
                self.texts[name].append(given)
        for place, piece in enumerate(delta.get("tool_calls") or []):
            index = piece.get("index", place)
            if piece.get("id") and self.calls.get(index, {}).get("id", piece["id"]) != piece["id"]:
                index = max(self.calls) + 1  # servers without indices send whole calls
            call = self.calls.setdefault(index, {"type": "function", "function": {"name": "", "arguments": ""}})
            if piece.get("id"):
                call["id"] = piece["id"]
            function = piece.get("function") or {}
            if (name := function.get("name") or "") != call["function"]["name"]:  # some repeat it
                call["function"]["name"] += name
            call["function"]["arguments"] += _as_text(function.get("arguments") or "")
        if choice.get("finish_reason") is not None:
            self.rest |= {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}

    def whole(self, index: int) -> dict[str, Any]:
        message: Message = {"role": "assistant"}
        message |= {name: _whole_characters("".join(parts)) for name, parts in self.texts.items() if parts}
        if self.calls:
            message["tool_calls"] = [call for _, call in sorted(self.calls.items())]
        return {"index": index, "message": message, **self.rest}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _whole_characters(text: str) -> str:
    """Put together what was sent as the two halves of a surrogate pair in two pieces."""
    try:
        return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        return text


def joined(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The response that the chunks of a stream add up to."""
    body: dict[str, Any] = {}
    choices: dict[int, _Piecewise] = {}
    for chunk in chunks:
        body |= {name: chunk[name] for name in ("id", "model") if chunk.get(name)}
        for choice in chunk.get("choices") or []:
            choices.setdefault(choice.get("index", 0), _Piecewise()).add(choice)
    return body | {"choices": [choice.whole(index) for index, choice in sorted(choices.items())]}


def _choices(place: str, body: dict[str, Any]) -> list[Answer]:
    if isinstance(body.get("choices"), list):
        if any("delta" in choice and "message" not in choice for choice in body["choices"]):
            return _choices(place, joined([body]))
        if any("message" not in choice for choice in body["choices"]):
            raise RowError(
                f"{place}: a response of /v1/completions: where its turns begin and end cannot be told; log "
                "/v1/chat/completions"
            )
        return [
            Answer(
                choice["message"] or {},
                choice.get("finish_reason"),
                choice=choice.get("index", number),
                stop_string=isinstance(choice["stop_reason"], str) if "stop_reason" in choice else None,
            )
            for number, choice in enumerate(body["choices"])
        ]
    if isinstance(body.get("output"), list):
        reason = (body.get("incomplete_details") or {}).get("reason")
        finished = {"completed": "stop", "incomplete": reason or "length"}.get(body.get("status", "completed"))
        return [Answer(_message_of_items(body["output"]), finished)]
    if isinstance(body.get("message"), dict):  # Ollama
        return [Answer(body["message"], body.get("done_reason"))]
    if body.get("role") == "assistant":
        return [Answer(body, body.get("finish_reason"))]
    raise RowError(f"{place}: the response has no choices; found the keys {sorted(body)}")


def _message_of_items(items: list[Any]) -> Message:
    """The assistant message of the output of /v1/responses."""
    texts: dict[str, list[str]] = {"message": [], "reasoning": []}
    calls = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            called = {"name": item.get("name"), "arguments": item.get("arguments", "")}
            calls.append({"id": item.get("call_id"), "type": "function", "function": called})
        elif kind in texts:
            parts = item.get("content") or []
            texts[kind] += [parts] if isinstance(parts, str) else [part.get("text") or "" for part in parts]
    message: Message = {"role": "assistant"}
    if texts["message"]:
        message["content"] = "".join(texts["message"])
    if texts["reasoning"]:
        message["reasoning_content"] = "".join(texts["reasoning"])
    return message | ({"tool_calls": calls} if calls else {})


def _reasoning(message: dict[str, Any]) -> Any:
    return message.get("reasoning_content") or message.get("reasoning")


def tidy_message(message: Message) -> Message:
    """Of an assistant message what templates read: reasoning under one name, no nulls, no counts and annotations."""
    kept = {"role": "assistant"} | {name: message[name] for name in KEPT if message.get(name) is not None}
    if isinstance(reasoning := _reasoning(message), str) and reasoning:
        kept["reasoning_content"] = reasoning
    return kept


def _checked(place: str, answer: Answer) -> Message:
    """The tidied message. Raises: Unusable, RowError."""
    if answer.finish_reason == "content_filter":
        raise Unusable("filtered")
    if answer.finish_reason in FAILURES:
        raise Unusable("errors")
    message = tidy_message(answer.message)
    if not any(message.get(name) for name in ("content", "reasoning_content", "tool_calls", "function_call")):
        raise Unusable("empty answers")
    message.setdefault("content", None if {"tool_calls", "function_call"} & set(message) else "")
    (message,) = messages_of(place, "response", [message])
    return message
