"""From the exact text that a target wrote to the message that the next turn's prompt shows."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepspec.data.conversation import Message
from deepspec.data.templates import Tools
from deepspec.regeneration.text import all_text
from deepspec.regeneration.writer import Answer

logger = logging.getLogger(__name__)

TAIL = 16  # tokens of the prompt that may decide how what follows is read
RECORD = ("raw", "finish_reason")  # keys of a message that no template reads
HARMONY = "<|channel|>"  # of gpt-oss
HARMONY_MESSAGE = re.compile(
    r"<\|channel\|>(?P<channel>\w+)(?P<header>[^<]*(?:<\|constrain\|>[^<]*)?)<\|message\|>(?P<text>.*?)"
    r"(?:<\|end\|>|<\|return\|>|<\|call\|>|$)",
    re.DOTALL,
)
TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Hermes, Qwen


class AnswerReader:
    """Reads the answers of one target."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._ends = [all_text(tokenizer, [token]) for token in stop_token_ids]
        self._has_parser = getattr(tokenizer, "response_template", None) is not None

    def message_of(self, answer: Answer, prompt_ids: Sequence[int], tools: Tools = None) -> dict[str, Any]:
        """An assistant message: `role`, `content`, what else the answer has (`thinking`, `tool_calls`, ...), `raw` and
        `finish_reason`.

        Thinking that the target wrote into its text stays in `content`: templates know how to treat it in later turns.
        """
        if answer.raw is None:
            return {"role": "assistant", **answer.message, "finish_reason": answer.finish_reason}
        text = self._without_end(answer.raw) if answer.finish_reason == "stop" else answer.raw
        parts = self._parsed(answer.raw, prompt_ids, tools)
        if parts is None and HARMONY in text:
            parts = read_harmony(answer.raw)
        if parts is None:
            parts = {"content": self._opening(prompt_ids, text) + text}
        return {"role": "assistant", **parts, "raw": answer.raw, "finish_reason": answer.finish_reason}

    def _without_end(self, raw: str) -> str:
        end = max((end for end in self._ends if end and raw.endswith(end)), key=len, default="")
        return raw.removesuffix(end)

    def _parsed(self, raw: str, prompt_ids: Sequence[int], tools: Tools) -> dict[str, Any] | None:
        """By the tokenizer's own parser, if it has one that understands the answer."""
        if not self._has_parser:
            return None
        try:
            parsed = self._tokenizer.parse_response(raw, prefix=list(prompt_ids), tools=[dict(t) for t in tools or ()])
        except Exception as error:  # parsers raise what they like
            logger.warning("the tokenizer's response parser does not understand an answer (%s): kept as text", error)
            return None
        return {"content": "", **{key: value for key, value in parsed.items() if key != "role"}}

    def _opening(self, prompt_ids: Sequence[int], text: str) -> str:
        """Where the template has begun to think for the target: what stands before its words."""
        tail = all_text(self._tokenizer, prompt_ids[-TAIL:])
        opening = tail[len(tail.rstrip().removesuffix("<think>")) :]
        return opening if opening.startswith("<think>") and not text.lstrip().startswith("<think>") else ""


def read_harmony(raw: str) -> dict[str, Any]:
    """The messages of a harmony answer: analysis is `thinking`, final (and commentary to the user) is `content`,
    commentary to a function is a tool call."""
    thinking, content, calls = [], [], []
    for match in HARMONY_MESSAGE.finditer(raw):
        named = re.search(r"to=functions\.([\w.-]+)", match["header"] + raw[: match.start()].rsplit("<|start|>", 1)[-1])
        if named and match["channel"] != "final":
            calls.append({"type": "function", "function": {"name": named[1], "arguments": _arguments(match["text"])}})
        elif match["channel"] == "analysis":
            thinking.append(match["text"])
        else:
            content.append(match["text"])
    parts: dict[str, Any] = {"content": "\n".join(content)}
    if thinking:
        parts["thinking"] = "\n".join(thinking)
    if calls:
        parts["tool_calls"] = calls
    return parts


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def shown(message: Message) -> Message:
    """A message as templates read it, without the record of how it was written."""
    return {key: value for key, value in message.items() if key not in RECORD}


def calls_of(message: Message) -> list[tuple[str, str]]:
    """Name and arguments of the functions that a message calls, be it in `tool_calls` or in its text."""
    found = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    if not found and isinstance(message.get("content"), str):
        found = [_arguments(text) for text in TOOL_CALL.findall(message["content"])]
    calls = []
    for call in found:
        if isinstance(call, dict):
            arguments = call.get("arguments")
            arguments = _arguments(arguments) if isinstance(arguments, str) else arguments
            calls.append((str(call.get("name")), json.dumps(arguments, sort_keys=True)))
    return calls
