"""The turns and tools of a row, however they are spelled, to messages in the form of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any

from deepspec.config import near_match
from deepspec.data.conversation import Message
from deepspec.data.jsonl import RowError

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
# What some templates know beside them. Left as they are: Llama's `ipython`, GLM's `observation`.
ROLES |= {role: role for role in ("ipython", "observation")}
ROLES |= dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai", "function_call"), "assistant")
ROLES |= dict.fromkeys(("function", "function_response", "tool_response"), "tool")
WITHOUT_CONTENT = {
    "tool_calls",
    "raw",
    "reasoning_content",
    "reasoning",
    "thinking",
}  # of an assistant
SHOWN_ROLES = "system, developer, user (human), assistant (gpt, model, bot), tool (function), ipython, observation"


def messages_of(place: str, column: str, value: Any) -> list[Message]:
    """The messages of a column that lists turns, as `{"role", "content"}` or as ShareGPT's `{"from", "value"}`.

    Roles are brought to the OpenAI API's, tool calls to `{"type": "function", "function": {"name", "arguments"}}` with
    the arguments as a dictionary where they can be read as one. Lists of content parts and whatever else a
    message has stay as they are; keys that are null are dropped, except `content`.

    Raises:
        RowError: naming the message and what is wrong with it.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = _read_json(place, column, value)
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise RowError(f"{place}: {column}: expected a list of messages, found {type(value).__name__}")
    if not value:
        raise RowError(f"{place}: {column}: the list is empty; remove the row or fill it")
    return [_message(place, f"{column}[{index}]", turn) for index, turn in enumerate(value)]


def _message(place: str, key: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{place}: {key}: expected a message with role and content, found {turn!r:.60}")
    role_key, content_key = "role" if "role" in turn else "from", "content" if "content" in turn else "value"
    spoken = turn.get(role_key)
    if not isinstance(spoken, str):
        found = f"no role; the keys are {', '.join(turn)}" if role_key not in turn else f"the role is {spoken!r:.60}"
        raise RowError(f"{place}: {key}: {found}; expected one of {SHOWN_ROLES}")
    role = ROLES.get(spoken) or ROLES.get(spoken.strip().lower())
    if role == "observation" and role_key == "from":
        role = "tool"
    if role is None:
        near = near_match(spoken, ROLES)
        raise RowError(f"{place}: {key}: unknown role {spoken!r:.60}; expected one of {SHOWN_ROLES}.{near}")
    message: Message = {"role": role, "content": turn.get(content_key)}
    if len(turn) > 2 or content_key not in turn:
        message |= {
            name: part for name, part in turn.items() if part is not None and name not in (role_key, content_key)
        }
        _tidy_calls(place, key, message)
    if spoken == "function_call":
        _call_from_text(message)
    if content_key not in turn and "tool_calls" not in message:
        raise RowError(f"{place}: {key} ({role}): no content; the keys are {', '.join(turn)}")
    _check_content(place, f"{key}.{content_key}", message)
    return message


def _check_content(place: str, key: str, message: Message) -> None:
    if not isinstance(message.get("raw", ""), str):
        raise RowError(f"{place}: {key}: raw must be the text that the target wrote, found {message['raw']!r:.60}")
    content = message["content"]
    if isinstance(content, str):
        return
    if content is None:
        if message["role"] != "assistant" or not WITHOUT_CONTENT & set(message):
            raise RowError(f"{place}: {key} ({message['role']}): null, which only goes with tool_calls; give a text")
    elif not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
        raise RowError(f"{place}: {key} ({message['role']}): expected a text or a list of parts, found {content!r:.60}")


def _tidy_calls(place: str, key: str, message: Message) -> None:
    """Bring the calls of an assistant message to one form, in place."""
    if legacy := message.pop("function_call", None):
        message.setdefault("tool_calls", [legacy])
    calls = message.get("tool_calls")
    if calls is None:
        return
    if isinstance(calls, str):
        calls = _read_json(place, f"{key}.tool_calls", calls) if calls.strip() else []
    if not isinstance(calls, list):
        raise RowError(f"{place}: {key}.tool_calls: expected a list, found {type(calls).__name__}")
    if not calls:
        del message["tool_calls"]
        return
    message["tool_calls"] = [_call(place, f"{key}.tool_calls[{index}]", call) for index, call in enumerate(calls)]


def _call(place: str, key: str, call: Any) -> dict[str, Any]:
    if isinstance(call, dict) and "function" not in call and "name" in call:
        named = {name: call[name] for name in ("name", "arguments") if name in call}
        call = {"type": "function", **{name: part for name, part in call.items() if name not in named}}
        call["function"] = named
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict) or not call["function"].get("name"):
        raise RowError(f'{place}: {key}: expected {{"function": {{"name", "arguments"}}}}, found {call!r:.80}')
    if not isinstance(call["function"]["name"], str):
        raise RowError(f"{place}: {key}.function.name: expected a text, found {call['function']['name']!r:.60}")
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        # What is no JSON object stays as it was written: a target may have called wrongly.
        read = _json_object(arguments)
        call = {**call, "function": {**call["function"], "arguments": arguments if read is None else read}}
    return call


def _call_from_text(message: Message) -> None:
    """ShareGPT's `{"from": "function_call", "value": '{"name", "arguments"}'}`; other spellings stay text."""
    call = _json_object(message["content"]) if isinstance(message["content"], str) else None
    if call and isinstance(call.get("name"), str) and "arguments" in call:
        message["tool_calls"] = [_call("", "", call)]
        message["content"] = None


def tools_of(place: str, column: str, value: Any) -> list[dict[str, Any]] | None:
    """The functions of a row: a list, or the JSON text of one. A bare `{"name", ...}` gets its wrapper. None if empty.

    Raises:
        RowError: it is no list of functions.
    """
    if isinstance(value, str):
        value = _read_json(place, column, value) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowError(f"{place}: {column}: expected a list of functions, found {type(value).__name__}")
    tools = []
    for index, given in enumerate(value):
        tool = _read_json(place, f"{column}[{index}]", given) if isinstance(given, str) else given
        if not isinstance(tool, dict):
            raise RowError(f"{place}: {column}[{index}]: expected a function as a JSON schema, found {given!r:.60}")
        if "function" not in tool and "name" in tool and tool.get("type", "function") == "function":
            tool = {"type": "function", "function": {name: part for name, part in tool.items() if name != "type"}}
        tools.append(tool)
    return tools


def _read_json(place: str, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{place}: {key}: a text that is not JSON ({error})") from error


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
