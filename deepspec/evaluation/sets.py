"""Prompt sets: one JSONL file each, a line is `{"turns": ["first user turn", ...], "system"?, "tools"?}` or
`{"messages": [...]}`, see `deepspec.data.prompts`. The prompt of a later turn holds the answers to the turns before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError, near_match
from deepspec.data.chat import render_prompt
from deepspec.data.conversation import Message
from deepspec.data.jsonl import DataError, read_jsonl
from deepspec.data.prompts import read_prompt, text_of
from deepspec.data.templates import TemplateError
from deepspec.evaluation.records import digest_of

Render = Callable[[Sequence[Message]], list[int]]  # messages to the ids of a prompt


@dataclass(frozen=True)
class Prompt:
    """One line of a set: what is said to the model before each of its answers."""

    index: int  # line of the set, from 0
    given: list[list[Message]]  # by turn, see `deepspec.data.prompts.PromptRow`
    ids: list[int]  # of the first turn
    place: str  # "FILE, line N"
    render: Render
    later: str | None  # digest of all that the prompts of later turns are made of; None = there is one turn

    def text_of(self, turn: int) -> str:
        """What the model answers in a turn, counted from 0."""
        return text_of(self.given[turn][-1])

    def ids_after(self, answers: Sequence[str]) -> list[int]:
        """The prompt of the turn behind so many answers.

        Raises:
            DataError: the chat template refuses the messages.
        """
        messages = list(self.given[0])
        for answer, following in zip(answers, self.given[1:], strict=False):
            messages += [{"role": "assistant", "content": answer}, *following]
        return _rendered(self.render, messages, f"{self.place}: turn {len(answers) + 1}")


def load_set(
    name: str,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    template_options: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    first_turn_only: bool = False,
) -> list[Prompt]:
    """The first `limit` prompts of a set, rendered as a conversation that the assistant is about to answer.

    Raises:
        ConfigError: no set of this name in `folder`.
        DataError: an empty or malformed file; the message names file and line.
    """
    prompts: list[Prompt] = []
    for index, (place, row) in enumerate(read_jsonl(set_file(name, folder))):
        if limit is not None and index >= limit:
            break
        prompt = read_prompt(row, place)
        render = partial(
            render_prompt,
            tokenizer,
            template_options=template_options,
            tools=prompt.tools,
            system_prompt=system_prompt,
        )
        given, later = prompt.given, None
        if first_turn_only:
            given = given[:1]
        if len(given) > 1:
            later = digest_of(
                [given[1:], prompt.tools, dict(template_options or {}), system_prompt, tokenizer.chat_template]
            )
        prompts.append(Prompt(index, given, _rendered(render, given[0], place), place, render, later))
    return prompts


def _rendered(render: Render, messages: Sequence[Message], what: str) -> list[int]:
    try:
        return render(messages)
    except TemplateError as error:
        raise DataError(f"{what}: {error}") from error


def set_file(name: str, folder: str | Path) -> Path:
    """The file of a set.

    Raises:
        ConfigError: it does not exist; the message lists those that do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"eval.prompts_dir={folder}: no such folder; `python -m data_prep.corpus` makes the built-in one, "
            "`python -m data_prep.eval_sets` the public sets"
        )
    known = sorted(file.stem for file in folder.glob("*.jsonl"))
    if name not in known:
        listed = ", ".join(known) or "none"
        raise ConfigError(f"eval.sets: no set '{name}' in {folder}; there are {listed}.{near_match(name, known)}")
    return folder / f"{name}.jsonl"
