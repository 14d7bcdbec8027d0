"""Prompt sets: one JSONL file each, `{"turns": ["first user turn", ...]}` a line. Only the first turn is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError, near_match
from deepspec.data.chat import render_prompt
from deepspec.data.jsonl import DataError, read_jsonl


@dataclass(frozen=True)
class Prompt:
    """The first turn of one line of a set."""

    index: int  # line of the set, from 0
    text: str
    ids: list[int]
    place: str  # "FILE, line N"


def load_set(
    name: str,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    template_options: Mapping[str, Any] | None = None,
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
        text = _first_turn(row, place)
        ids = render_prompt(tokenizer, [{"role": "user", "content": text}], template_options)
        prompts.append(Prompt(index, text, ids, place))
    return prompts


def set_file(name: str, folder: str | Path) -> Path:
    """The file of a set.

    Raises:
        ConfigError: it does not exist; the message lists those that do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"eval.prompts_dir={folder}: no such folder; `python -m data_prep.corpus` makes the built-in one"
        )
    known = sorted(file.stem for file in folder.glob("*.jsonl"))
    if name not in known:
        listed = ", ".join(known) or "none"
        raise ConfigError(f"eval.sets: no set '{name}' in {folder}; there are {listed}.{near_match(name, known)}")
    return folder / f"{name}.jsonl"


def _first_turn(row: dict[str, Any], place: str) -> str:
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f'{place}: expected {{"turns": ["...", ...]}} with at least one turn; found the keys {sorted(row)}'
        )
    if not isinstance(turns[0], str) or not turns[0].strip():
        raise DataError(f"{place}: the first turn must be a non-empty text, found {turns[0]!r}")
    return turns[0]
