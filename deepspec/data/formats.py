"""Conversations of any source in any of the common formats, told apart by their columns."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspec.data.conversation import Conversation, Message
from deepspec.data.jsonl import DataError, OnBadRow, RowError, refuse_row
from deepspec.data.sources import read_rows
from deepspec.data.surrogates import has_half, mend
from deepspec.data.turns import messages_of, tools_of
from deepspec.text import some

logger = logging.getLogger(__name__)

TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
PROMPTS = ("prompt", "instruction", "question", "query", "problem")
ANSWERS = ("response", "completion", "output", "solution", "answer", "chosen")  # where several are there, the first
ADDITIONS = ("input", "context")  # what a question is about
SYSTEMS, TOOLS = ("system", "system_prompt"), ("tools", "functions")
IDS = ("id", "conversation_id", "uuid", "prompt_id")
ACCEPTED = (
    "messages (OpenAI), conversations (ShareGPT), prompt + response, instruction [+ input] + output (Alpaca), "
    "question + answer, prompt + chosen (preferences), and without answers turns or prompt"
)
UNUSABLE_ROWS = 100  # that many at a source's start, and it is refused even where bad rows are skipped


@dataclass(frozen=True)
class Format:
    """How the columns of a row make a conversation."""

    name: str
    turns: str | None = None  # column of messages
    prompt: str | None = None
    answer: str | None = None
    addition: str | None = None
    system: str | None = None
    tools: str | None = None
    id: str | None = None

    @property
    def columns(self) -> list[str]:
        read = (self.turns, self.prompt, self.addition, self.answer, self.system, self.tools, self.id)
        return [column for column in read if column is not None]


def recognise(columns: Collection[str]) -> Format | None:
    """The format of rows with these columns (of a row: those that are not null); None if it is none that is known."""

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    shared = {"system": first(SYSTEMS), "tools": first(TOOLS), "id": first(IDS)}
    if turns := first(TURNS):
        return Format("OpenAI messages" if turns == "messages" else "ShareGPT conversations", turns, **shared)
    prompt, answer, addition = first(PROMPTS), first(ANSWERS), first(ADDITIONS)
    if prompt is None and addition == "input" and answer is not None:
        prompt, addition = addition, None
    if answer == "chosen":
        return Format("preferences, of which the chosen answer is read", None, prompt, answer, addition, **shared)
    if prompt and answer:
        names = {"instruction": "Alpaca instructions", "question": "questions and answers"}
        return Format(names.get(prompt, "prompts and responses"), None, prompt, answer, addition, **shared)
    if "turns" in columns:
        return Format("prompts without answers", "turns", **shared)
    if prompt:
        return Format("prompts without answers", None, prompt, None, addition, **shared)
    return None


def read_conversations(
    sources: Sequence[str],
    *,
    on_format: Callable[[str], None] = logger.info,
    on_bad_row: OnBadRow | None = None,
) -> Iterator[Conversation]:
    """Yield the conversations of the sources, one source after the other, without holding more than a few rows.

    Args:
        sources: see `deepspec.data.sources.read_rows`.
        on_format: told the format of every source, in one line.
        on_bad_row: told of every row that cannot be used, which is then skipped; None = the first is raised.

    Raises:
        DataError: a source does not exist, cannot be read, or has rows of no known format.
        RowError: a single row is wrong, and there is no `on_bad_row`.
    """
    for source in [sources] if isinstance(sources, str) else sources:
        yield from _conversations_of(source, on_format, on_bad_row)


def _conversations_of(
    source: str, on_format: Callable[[str], None], on_bad_row: OnBadRow | None
) -> Iterator[Conversation]:
    known: dict[tuple[str, ...], Format | None] = {}
    said: set[str] = set()
    good, bad = 0, 0

    def refuse(error: RowError) -> None:
        nonlocal bad
        bad += 1
        if good == 0 and bad == UNUSABLE_ROWS:
            raise DataError(f"{source}: none of the first {bad} rows can be used; the last one: {error}") from error
        refuse_row(error, on_bad_row)

    mended = 0
    for place, row in read_rows(source, on_bad_row=refuse):
        columns = tuple(name for name, value in row.items() if value is not None)
        if columns not in known:
            known[columns] = recognise(columns)
        layout = known[columns] or recognise(row)
        try:
            if layout is None:
                raise RowError(f"{place}: {explain_columns(row)}")
            is_broken = has_half(row)
            mended += is_broken
            conversation = convert(place, mend(row) if is_broken else row, layout)
        except RowError as error:
            refuse(error)
            continue
        if layout.name not in said:
            said.add(layout.name)
            where = source if good == 0 else place
            rest = [name for name in row if name not in layout.columns]
            unread = f"; not read: {some(rest)}" if rest else ""
            on_format(f"{where}: {layout.name} (columns {', '.join(layout.columns)}{unread})")
        good += 1
        yield conversation
    if good == 0:
        raise DataError(f"{source}: none of the {bad} rows can be used")
    if mended:
        logger.warning(
            "%s: %d rows held half of a surrogate pair, now U+FFFD, as an emoji that was cut", source, mended
        )


def convert(place: str, row: dict[str, Any], layout: Format) -> Conversation:
    """The conversation of one row.

    Raises:
        RowError: naming the column and what is wrong with it.
    """
    messages = _messages(place, row, layout)
    system = row[layout.system] if layout.system else None
    if system is not None and not isinstance(system, str):
        raise RowError(f"{place}: {layout.system}: expected a text, found {system!r:.60}")
    if system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    tools = tools_of(place, layout.tools, row[layout.tools]) if layout.tools else None
    return Conversation(_id(row, layout, messages, tools), messages, tools, place, row)


def content_id(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> str:
    """A digest of what a conversation says: the same wherever the row stands."""
    content = json.dumps([messages, tools or None], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _id(row: dict[str, Any], layout: Format, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
    given = row[layout.id] if layout.id else None
    usable = isinstance(given, str | int) and not isinstance(given, bool) and given != ""
    return str(given) if usable else content_id(messages, tools)


def _messages(place: str, row: dict[str, Any], layout: Format) -> list[Message]:
    if layout.turns == "turns" and isinstance(row["turns"], list):
        turns = [{"role": "user", "content": turn} if isinstance(turn, str) else turn for turn in row["turns"]]
        return messages_of(place, "turns", turns)
    if layout.turns:
        return messages_of(place, layout.turns, row[layout.turns])
    messages = _said(place, layout.prompt, row, "user") if layout.prompt else []
    if layout.addition and (addition := row[layout.addition]):
        _add(place, layout.addition, addition, messages)
    if layout.answer and row[layout.answer] is not None:
        answers = _said(place, layout.answer, row, "assistant")
        if answers[0]["role"] not in ("system", "developer", "user"):
            return [*messages, *answers]
        # Preference sets often repeat the prompt in the answer, and may have no other.
        with_system = bool(messages) and messages[0]["role"] == "system" and answers[0]["role"] == "user"
        return [messages[0], *answers] if with_system else answers
    return messages


def _said(place: str, column: str, row: dict[str, Any], role: str) -> list[Message]:
    value = row[column]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{place}: {column}: expected a text or a list of messages, found {value!r:.60}")
    return messages_of(place, column, value)


def _add(place: str, column: str, addition: Any, messages: list[Message]) -> None:
    if not isinstance(addition, str) or not isinstance(messages[-1]["content"], str):
        raise RowError(f"{place}: {column}: expected a text beside a prompt that is a text, found {addition!r:.60}")
    messages[-1]["content"] += f"\n\n{addition}"


def explain_columns(row: dict[str, Any]) -> str:
    """Why a row is of no known format: what it has, what the nearest format would need, and what there is."""
    columns = ", ".join(row) or "none"
    return f"no known format: found the columns {columns}. {_nearest(row)} Accepted are {ACCEPTED}"


def _nearest(row: dict[str, Any]) -> str:
    for column, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and recognise(value[0]):
            return f"The rows seem to be listed under '{column}': write that list as a file of its own."
    for column in row:
        if near := difflib.get_close_matches(column.lower(), (*TURNS, *PROMPTS), n=1, cutoff=0.75):
            return f"Rename '{column}' to '{near[0]}', if that is what it holds."
    if answer := next((name for name in ANSWERS if name in row), None):
        return f"'{answer}' is an answer without its question: add a column 'prompt'."
    if "text" in row:
        return "Plain text has no turns, so what the assistant said cannot be told from the rest: give 'messages'."
    return 'Nearest is the OpenAI format: give a column \'messages\', a list of {"role", "content"}.'
