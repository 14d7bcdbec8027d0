"""Logged requests to an OpenAI-compatible server, in the shapes that servers, gateways and the batch API write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from deepspec.data.conversation import Message
from deepspec.data.jsonl import RowError
from deepspec.data.responses import CUT_REASONS, FAILURES, Answer, Unusable, answers_of, tidy_message
from deepspec.data.turns import messages_of, tools_of

REQUESTS = ("request", "request_body", "requestBody", "req", "body", "kwargs", "input", "inputs")
RESPONSES = ("response", "response_body", "responseBody", "response_obj", "output", "outputs", "chunks", "completion")
WRAPPERS = ("body", "json", "kwargs")  # within a request or a response, what holds the body
PARAMETERS = ("optional_params", "model_parameters", "extra_body")  # where gateways keep the rest of a request
ASKS = ("messages", "prompt", "input")  # keys of a request body
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Exchange:
    """What was said to the model, and one answer."""

    place: str  # "FILE, line N"
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    answer: Answer
    requested_model: str | None
    stop_strings: bool  # whether the request named some
    template_options: dict[str, Any] | None  # chat_template_kwargs of the request
    name: str | None  # what the log calls the request

    @property
    def model(self) -> str:
        return self.answer.model or self.requested_model or "(no model named)"

    @property
    def cut(self) -> bool:
        """Whether the answer ended without its end-of-turn token."""
        at_stop_string = self.stop_strings if self.answer.stop_string is None else self.answer.stop_string
        return self.answer.finish_reason in (None, *CUT_REASONS) or (
            self.answer.finish_reason == "stop" and at_stop_string
        )


@dataclass
class LogReader:
    """Reads rows of one or several logs; keeps what waits for its other half, as in files of the batch API."""

    waiting_requests: dict[str, dict[str, Any]] = field(default_factory=dict)  # by custom_id
    waiting_responses: dict[str, Any] = field(default_factory=dict)

    def exchanges(self, place: str, row: dict[str, Any], on_unusable: Callable[[str], None]) -> list[Exchange]:
        """The answered requests of a row: several for several choices, none where the other half has not come yet.

        Args:
            on_unusable: told the reason where there is nothing to learn from: an error, a filtered or empty answer,
                images.

        Raises:
            RowError: no request and response can be found in the row.
        """
        try:
            return list(self._exchanges(place, row, on_unusable))
        except Unusable as reason:
            on_unusable(str(reason))
            return []
        except RowError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RowError(f"{place}: of no known shape ({type(error).__name__}: {error})") from error

    def _exchanges(self, place: str, row: dict[str, Any], on_unusable: Callable[[str], None]) -> Iterator[Exchange]:
        if _failed(row):
            raise Unusable("errors")
        request, response = _request_of(row), _first(row, RESPONSES)
        if isinstance(row.get("custom_id"), str):
            request, response = self._paired(row["custom_id"], request, response)
            if request is None or response is None:
                return
        if request is None or response is None:
            missing = " and ".join(
                name for name, found in (("request with messages", request), ("response", response)) if found is None
            )
            raise RowError(f"{place}: no {missing} to be found; found the keys {sorted(row)}")
        if isinstance(response, dict):
            if _failed(response):
                raise Unusable("errors")
            response = next((response[name] for name in WRAPPERS if name in response), response)
        yield from _answered(place, row, request, response, on_unusable)

    def _paired(self, custom_id: str, request: Any, response: Any) -> tuple[Any, Any]:
        if request is None and response is not None and custom_id in self.waiting_requests:
            return self.waiting_requests.pop(custom_id), response
        if response is None and request is not None and custom_id in self.waiting_responses:
            return request, self.waiting_responses.pop(custom_id)
        if request is None and response is not None:
            self.waiting_responses[custom_id] = response
        elif response is None and request is not None:
            self.waiting_requests[custom_id] = request
        return request, response


def _answered(
    place: str, row: dict[str, Any], request: dict[str, Any], response: Any, on_unusable: Callable[[str], None]
) -> Iterator[Exchange]:
    parameters = request | {
        name: value
        for key in PARAMETERS
        for name, value in (_read(request.get(key)) or {}).items()
        if value is not None
    }
    messages = _messages(place, request)
    if messages[-1]["role"] == "assistant":
        raise Unusable("continued answers")
    tools = tools_of(place, "tools", parameters.get("tools") or parameters.get("functions"))
    options = parameters.get("chat_template_kwargs")
    named = row.get("custom_id") or row.get("request_id") or row.get("id")
    model = request.get("model") or row.get("model")
    for answer in answers_of(place, response, on_unusable):
        stops, name = bool(parameters.get("stop")), str(named) if named else None
        yield Exchange(place, messages, tools, answer, model, stops, options or None, name)


def _failed(part: dict[str, Any]) -> bool:
    """Whether a row, or a response with its status around the body, tells of a failure."""
    status = part.get("status_code", part.get("status"))
    bad_status = isinstance(status, int) and status >= 300
    return bool(part.get("error")) or bad_status or status in (*FAILURES, "failure")


def _read(value: Any) -> Any:
    """Bodies may be logged as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((_read(row[name]) for name in names if row.get(name) is not None), None)


def _request_of(row: dict[str, Any]) -> dict[str, Any] | None:
    for name in REQUESTS:
        value = _read(row.get(name))
        while isinstance(value, dict) and not set(ASKS) & set(value):
            value = next((_read(value[wrapper]) for wrapper in WRAPPERS if wrapper in value), None)
        if isinstance(value, list):
            value = {"messages": value}
        if isinstance(value, dict):
            return value
    if any(row.get(name) is not None for name in ("messages", "prompt")):
        return row | {"messages": _read(row.get("messages"))}
    return None


def _messages(place: str, request: dict[str, Any]) -> list[Message]:
    """Raises: Unusable, RowError."""
    if request.get("messages") is not None:
        messages = messages_of(place, "messages", request["messages"])
    elif request.get("input") is not None:
        if request.get("previous_response_id"):
            raise Unusable("continuations of a stored response")
        messages = messages_of(place, "input", list(_messages_of_items(request["input"])))
        if isinstance(request.get("instructions"), str):
            messages.insert(0, {"role": "system", "content": request["instructions"]})
    else:
        raise RowError(
            f"{place}: a request of /v1/completions: its prompt is one text, in which turns cannot be told apart; log "
            "/v1/chat/completions"
        )
    return [_tidy(message) for message in messages]


def _messages_of_items(items: Any) -> Iterator[Message]:
    """The input of /v1/responses as messages; calls that follow one another are one turn."""
    calls: list[dict[str, Any]] = []
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "function_call":
            called = {"name": item.get("name"), "arguments": item.get("arguments", "")}
            calls.append({"id": item.get("call_id"), "type": "function", "function": called})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if kind == "function_call_output":
            yield {"role": "tool", "content": str(item.get("output")), "tool_call_id": item.get("call_id")}
        elif kind != "reasoning":
            yield item
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


def _tidy(message: Message) -> Message:
    """Parts that are all text become one text; what is no text cannot be learned from. `developer` is the newer name of
    `system`, which every template knows."""
    content = message["content"]
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        if not all(part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str) for part in parts):
            raise Unusable("with images or audio")
        content = "".join(part["text"] for part in parts)
    message = {**message, "content": content}
    if message["role"] == "developer":
        message["role"] = "system"
    return {**tidy_message(message), "content": content} if message["role"] == "assistant" else message
