"""Conversations to the texts that are learned from: what the target reads, and what it writes itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from deepspec.data.conversation import Message
from deepspec.data.templates import MARKER, ChatTemplate, TemplateError, Tools, shared_length, whole_markers

Piece = tuple[str, bool]  # text of a sample, and whether the assistant wrote it
Sample = list[Piece]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# What templates put before an answer without thoughts, so that it looks like one that has thought: `<think></think>`.
EMPTY_THOUGHT = re.compile(r"\s*(?:<[^<>/\s]+>)?\s*</[^<>\s]+>\s*")


def write_samples(template: ChatTemplate, messages: Sequence[Message], tools: Tools = None) -> list[Sample]:
    """The texts to learn from: every assistant turn as the target sees the conversation when it writes that turn.

    What is supervised is the text of the assistant's turns and their ends, since the draft has to predict where a turn
    ends. The template's `{% generation %}` markers say it; without them it is the difference between the conversation
    with the turn and the prompt before it. A message's `raw` text needs no template. An answer that was cut
    (`finish_reason` "length") has no end. A turn of `weight` 0 is only context.

    Turns share a sample where each continues what stands before; a template that rewrites earlier turns (drops
    their thoughts, for instance) makes a sample of each.

    Raises:
        TemplateError: the template refuses the conversation, or the answer cannot be told from what stands around it.
        ValueError: the conversation has no assistant turn.
    """
    messages = template.with_system_prompt(messages)
    answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    turns = [number for number in answers if messages[number].get("weight") != 0]
    if not turns:
        roles = [message.get("role") for message in messages]
        raise ValueError(f"the conversation has no assistant turn to learn from (roles: {roles}); add one")
    readable = template.readable(messages, tools)
    is_as_given = len(turns) < len(answers)  # markers are around every answer
    is_as_given |= any("raw" in messages[n] or messages[n].get("finish_reason") == "length" for n in turns)
    if template.has_markers(tools) and not is_as_given:
        return _marked_samples(template, readable, turns, tools)
    samples: list[Sample] = []
    for number in turns:
        context, answer = _Turn(template, messages[number], readable, number, tools).split()
        before = "".join(text for text, _ in samples[-1]) if samples else None
        if before is not None and context.startswith(before):
            samples[-1] += [(context[len(before) :], False), (answer, True)]
        else:
            samples.append([(context, False), (answer, True)])
    return samples


def _marked_samples(template: ChatTemplate, messages: list[Message], turns: list[int], tools: Tools) -> list[Sample]:
    text, spans = template.marked(messages, tools)
    if not any(last > first for first, last in spans):
        raise TemplateError(f"the {{% generation %}} markers of {template.name} enclose nothing of this conversation")
    thoughts = Counter(filter(None, (_thoughts(messages[number]) for number in turns)))
    if all(text.count(thought) >= times for thought, times in thoughts.items()):
        return [_cut_up(text, spans)]
    samples = []
    for number in turns:
        earlier = len(template.marked(messages[:number], tools)[1]) if number else 0
        text, spans = template.marked(messages[: number + 1], tools)
        samples.append(_cut_up(text, spans[earlier:]))
    return samples


def _cut_up(text: str, spans: Sequence[tuple[int, int]]) -> Sample:
    pieces, end = [], 0
    for first, last in spans:
        pieces += [(text[end:first], False), (text[first:last], True)]
        end = last
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]


def _thoughts(message: Message) -> str:
    """What the assistant thought before it answered, as a field or at the head of its content."""
    for field in THOUGHTS:
        if isinstance(message.get(field), str) and message[field].strip():
            return message[field].strip()
    before, found, _ = _content(message).partition("</think>")
    return before.rpartition("<think>")[2].strip() if found else ""


def _content(message: Message) -> str:
    content = message.get("content")
    return content[0]["text"] if isinstance(content, list) else content or ""


def _shared_length(one: str, other: str) -> int:
    """How many characters of both are the same, without those of a control token that only begins alike."""
    shared = shared_length(one, other)
    return min(len(whole_markers(one, shared)), len(whole_markers(other, shared)))


def _squeezed(text: str) -> str:
    """Without white space, which templates strip and add."""
    return "".join(text.split())


class _Turn:
    """An assistant's turn in a conversation, to be told from what stands before and behind it."""

    def __init__(self, template: ChatTemplate, message: Message, readable: list[Message], number: int, tools: Tools):
        """
        Args:
            message: the turn as it was given.
            readable: the conversation as the template reads it.
            number: of the turn in it.
        """
        self.template, self.message, self.tools = template, message, tools
        self.before, self.turn, self.behind = readable[:number], readable[number], readable[number + 1 :]
        self.is_cut = message.get("finish_reason") == "length"

    def split(self) -> tuple[str, str]:
        """What the target reads, and what it then writes.

        Raises:
            TemplateError: see `write_samples`.
        """
        prompt = self._prompt()
        raw = self.message.get("raw")
        if raw is not None:
            if prompt is None:
                raise TemplateError(f"{self.template.name} makes no prompt of the turns before the assistant's")
            return prompt, raw
        try:
            full = self.template.text([*self.before, self.turn], self.tools)
        except TemplateError as error:
            return self._within_the_whole(error)
        shared = 0 if prompt is None else _shared_length(full, prompt)
        if prompt is not None and (shared == len(prompt) or self._says_last(full[:shared])):
            opened = self._opening(full[shared:], prompt[shared:])
            context, answer = prompt if opened else full[:shared], self._answer(full, shared + opened)
        else:  # nothing to compare with, or a template that shows a prompt otherwise than what has been answered
            start = self._content_start(full)
            context, answer = full[:start] if prompt is None else prompt, self._answer(full, start)
        if prompt is not None and not self._is_shown(answer):
            context, answer = self._as_written(prompt)
        else:
            skipped = self._empty_thought(answer)
            context, answer = context + answer[:skipped], answer[skipped:]
        self._check(context, answer, full, prompt)
        return context, answer

    def _prompt(self) -> str | None:
        if not self.before:
            return None
        try:
            return self.template.text(self.before, self.tools, is_prompt=True)
        except TemplateError:
            if "raw" in self.message:
                raise
            return None

    def _opening(self, answer: str, rest: str) -> int:
        """Characters of the turn's opening, where what stands before it differs from the prompt.

        Args:
            answer: the conversation behind what it shares with the prompt.
            rest: the prompt behind it.
        """
        for marker in MARKER.finditer(rest):
            opening = rest[marker.start() :]
            place = answer.find(opening, 0, self._content_place(answer))
            if place >= 0 and not MARKER.sub("", answer[:place]).strip():
                return place + len(opening)
        return 0

    def _says_last(self, context: str) -> bool:
        """Whether a context holds the message before the turn."""
        if not self.before:
            return False
        said = _squeezed(_content(self.before[-1]))
        return said in _squeezed(context) or self.before[-1].get("role") == "tool"

    def _content_start(self, full: str) -> int:
        """Where the conversation differs when the content of the turn does."""
        return _shared_length(full, self._with_other_content([]))

    def _with_other_content(self, behind: list[Message]) -> str:
        ends = {*_content(self.turn).strip()[:1], *_content(self.turn).strip()[-1:]}
        other = next(letter for letter in "ABC" if letter not in ends)
        return self.template.text([*self.before, {**self.turn, "content": other}, *behind], self.tools)

    def _within_the_whole(self, error: TemplateError) -> tuple[str, str]:
        """For a template that refuses a conversation without what comes later, such as a first question."""
        if not self.behind:
            raise error
        whole = self.template.text([*self.before, self.turn, *self.behind], self.tools)
        other = self._with_other_content(self.behind)
        start, end = _shared_length(whole, other), len(whole) - shared_length(whole[::-1], other[::-1])
        ending = self.template.ending.end_of_turn
        if not whole.startswith(ending, end) or _squeezed(_content(self.turn)) != _squeezed(whole[start:end]):
            raise error
        return whole[:start], whole[start:end] + ("" if self.is_cut else ending)

    def _answer(self, full: str, start: int) -> str:
        """From `start` to the end of the turn."""
        ending = self.template.ending
        if full.endswith(ending.tail):
            body = full[start : len(full) - len(ending.tail)]
            return body if self.is_cut else body + self._end_of_turn(full)
        answer = full[start:].rstrip()
        markers = MARKER.findall(ending.end_of_turn)
        end = answer.rfind(markers[-1]) if markers else -1
        return answer if end < 0 else answer[: end + len(markers[-1])]

    def _end_of_turn(self, full: str) -> str:
        """Of a call whose end the template shows only with what follows, what that begins with."""
        ending = self.template.ending
        if ending.tail.strip() or not self.turn.get("tool_calls"):
            return ending.end_of_turn
        if not self.behind or full.endswith(ending.end_of_turn):
            return ""
        longer = self.template.text([*self.before, self.turn, self.behind[0]], self.tools)
        first = MARKER.match(longer, len(full)) if longer.startswith(full) else None
        return first.group() if first else ""

    def _is_shown(self, answer: str) -> bool:
        """Whether the template shows the turn. Some leave out empty ones, or the thoughts of the last one."""
        content = _content(self.turn)
        if self.turn.get("tool_calls"):
            return True
        if not content.strip():
            return self.is_cut or self.template.ending.end_of_turn in answer
        return "</think>" not in content or _squeezed(_thoughts(self.turn)) in _squeezed(answer)

    def _as_written(self, prompt: str) -> tuple[str, str]:
        """The content behind the prompt, which may have written its beginning."""
        content = _content(self.turn)
        repeated = next((n for n in range(min(len(content), 64), 0, -1) if prompt.endswith(content[:n])), 0)
        return prompt, content[repeated:] + ("" if self.is_cut else self.template.ending.end_of_turn)

    def _empty_thought(self, answer: str) -> int:
        """Characters of an empty thought that the template, not the target, put before the answer."""
        found = EMPTY_THOUGHT.match(answer)
        return min(found.end(), self._content_place(answer)) if found else 0

    def _content_place(self, answer: str) -> int:
        """Where in an answer the content begins, which templates strip; its length where there is none."""
        content = _content(self.turn)
        places = [answer.find(text) for text in (content, content.strip("\n"), content.strip()) if text.strip()]
        return next((place for place in places if place >= 0), len(answer))

    def _check(self, context: str, answer: str, full: str, prompt: str | None) -> None:
        """
        Raises:
            TemplateError: what is supervised is not this turn, all of it, and nothing else.
        """
        content = _content(self.turn)
        said = content.rpartition("</think>")[2] if _thoughts(self.turn) else content
        shown = _squeezed(answer)
        names = [call["function"]["name"] for call in self.turn.get("tool_calls") or []]
        has_all = _squeezed(said) in shown and all(name in answer for name in names)
        if has_all and (not self.before or self._says_last(context)):
            return
        if prompt is None:
            found = f"the conversation with the answer is {full[-80:]!r}"
        else:
            place = shared_length(full, prompt)
            found = (
                f"with the answer it goes on {full[place : place + 60]!r} where the prompt goes on "
                f"{prompt[place : place + 60]!r} (character {place})"
            )
        raise TemplateError(
            f"{self.template.name} does not show the answer {content[:40]!r} so that it can be told apart: {found}; "
            "give a template with {% generation %} markers: data.chat_template=FILE.jinja"
        )
