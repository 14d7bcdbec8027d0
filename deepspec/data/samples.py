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
EMPTY_THOUGHT = re.compile(
    r"\s*(?:<([^<>/\s]+)>\s*</\1>|</[^<>\s]*(?:think|thought|reason)[^<>\s]*>)\s*", re.IGNORECASE
)
CUT = ("length", "max_tokens")  # finish reasons of an answer that has no end


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
    is_as_given |= any("raw" in messages[n] or messages[n].get("finish_reason") in CUT for n in turns)
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
    marked = "".join(text[first:last] for first, last in spans)
    if all(marked.count(thought) >= times for thought, times in thoughts.items()):
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
        self.is_cut = message.get("finish_reason") in CUT

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
        if prompt is not None and self._is_behind_the_rest(full, prompt, shared):
            opened = self._opening(full[shared:], prompt[shared:])
            context, answer = prompt if opened else full[:shared], self._answer(full, shared + opened)
        else:  # nothing to compare with, or a template that shows a prompt otherwise than what has been answered
            start = self._content_start(full)
            has_prompt = prompt is not None and self.before[-1].get("role") != "assistant"
            context, answer = prompt if has_prompt and prompt else full[:start], self._answer(full, start)
        if prompt is not None and not self._is_shown(answer):
            context, answer = self._as_written(prompt)
        else:
            skipped = self._empty_thought(answer)
            context, answer = context + answer[:skipped], answer[skipped:]
        self._check(answer, full, prompt)
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

    def _is_behind_the_rest(self, full: str, prompt: str, shared: int) -> bool:
        """Whether all that stands before the turn is in what conversation and prompt share.

        If they part earlier, the conversation with another message before the turn says where that message ends. After
        a turn of the assistant, templates often open no other one.
        """
        if self.before[-1].get("role") == "assistant":
            return False
        if shared == len(prompt):
            return True
        content = _content(self.before[-1])
        other = next(letter for letter in "ABC" if letter not in content[-1:])
        before = [*self.before[:-1], {**self.before[-1], "content": other}]
        try:
            otherwise = self.template.text([*before, self.turn], self.tools)
        except TemplateError:
            return False
        return 0 < len(full) - shared_length(full[::-1], otherwise[::-1]) <= shared

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
        """From `start` to the end of the turn, or of an answer that was cut to its last text."""
        ending = self.template.ending
        if self.is_cut:
            return self._cut(full[start:])
        if full.endswith(ending.tail):
            return full[start : len(full) - len(ending.tail)] + self._end_of_turn(full)
        answer = full[start:].rstrip()
        markers = MARKER.findall(ending.end_of_turn)
        end = answer.rfind(markers[-1]) if markers else -1
        return answer if end < 0 else answer[: end + len(markers[-1])]

    def _cut(self, answer: str) -> str:
        for last in (_content(self.turn), _content(self.turn).strip(), _thoughts(self.turn)):
            place = answer.rfind(last) if last.strip() else -1
            if place >= 0:
                return answer[: place + len(last)]
        if self.turn.get("tool_calls"):
            raise TemplateError("an answer that was cut within a tool call cannot be rendered; leave it out")
        return ""

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
        if self.is_cut and "<think>" in content and "</think>" not in content:
            return False
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

    def _check(self, answer: str, full: str, prompt: str | None) -> None:
        """
        Raises:
            TemplateError: what is supervised is not all of this turn with its end.
        """
        content = _content(self.turn)
        said = content.rpartition("</think>")[2] if _thoughts(self.turn) else content
        calls = [] if self.is_cut else self.turn.get("tool_calls") or []
        names = [str(call["function"]["name"]) for call in calls]
        has_all = _squeezed(said) in _squeezed(answer) and all(name in answer for name in names)
        if has_all and (self.is_cut or calls or answer.endswith(self.template.ending.end_of_turn)):
            return
        if calls and said.strip():
            raise TemplateError(f"{self.template.name} does not show the text {said[:40]!r} beside a tool call")
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
