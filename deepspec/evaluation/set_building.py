"""Public sets, as they are published, to prompt sets."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.data.hub import LONGEST_REASON, PREFIX
from deepspec.data.jsonl import DataError
from deepspec.data.prompts import read_prompt
from deepspec.data.sources import DATA_SUFFIXES, read_rows
from deepspec.evaluation.public_sets import PUBLISHED_SEED, PublicSet

IDS = ("task_id", "unique_id", "question_id", "uid", "prompt_id", "problem_idx", "id", "ID")


@dataclass(frozen=True)
class BuiltSet:
    """The prompts of a public set."""

    rows: list[dict[str, Any]]  # {"id", "turns"}
    sources: list[str]  # that they were read from
    warning: str | None  # how they differ from what was published

    def text(self) -> str:
        """The content of the JSONL file."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)


def build_set(wanted: PublicSet, sources: Sequence[str], *, published_order: bool = False) -> BuiltSet:
    """Read the rows of a set and word its prompts.

    Args:
        sources: see `deepspec.data.sources.read_rows`.
        published_order: shuffle a set of which the published protocol decodes only a part as that does, so that the
            first `measured` prompts are the ones that were measured.

    Raises:
        DataError: a source cannot be read, or a row is not of this set; the message names file and line.
    """
    rows = [row for source in sources for row in _prompts(wanted, source)]
    numbered = [{"id": found or str(number), "turns": turns} for number, (found, turns) in enumerate(rows, start=1)]
    if not numbered:
        raise DataError(f"{wanted.name}: no row of {', '.join(sources)} belongs to its test split")
    warning = _difference(wanted, numbered)
    if published_order and len(numbered) > wanted.measured:
        random.Random(PUBLISHED_SEED).shuffle(numbered)
    return BuiltSet(numbered, list(sources), warning)


def _prompts(wanted: PublicSet, source: str) -> Iterator[tuple[str | None, list[str]]]:
    """Of each row the id that it came with, if any, and its turns."""
    for place, row in read_rows(source):
        try:
            if not wanted.keep(row):
                continue
            turns = wanted.turns(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{place}: not a row of {wanted.name} as it is published: no usable {error}; found the keys "
                f"{sorted(row)}"
            ) from error
        read_prompt({"turns": turns}, place)  # or refuse
        found = next((row[name] for name in IDS if isinstance(row.get(name), str | int)), None)
        yield None if found is None else str(found), turns


def prompts_digest(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the lines `{"turns": [...]}`, as published files hold them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps({"turns": row["turns"]}, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()


def _difference(wanted: PublicSet, rows: Sequence[dict[str, Any]]) -> str | None:
    if len(rows) != wanted.prompts:
        return f"{len(rows)} prompts where {wanted.prompts} were published"
    if wanted.sha256 is not None and prompts_digest(rows) != wanted.sha256:
        return "not word for word, or not in the order, that was published"
    return None


def sources_on_disk(wanted: PublicSet, folder: Path, shared_names: set[str]) -> list[str]:
    """Where the files of a set lie in a folder of original files: FOLDER/SET/ORIGINAL, any data in FOLDER/SET,
    FOLDER/SET.jsonl (or .json, .parquet, ...), or FOLDER/ORIGINAL.

    Args:
        shared_names: of original files that several of the sets call theirs; these count only in FOLDER/SET.

    Raises:
        DataError: nowhere; says where they are looked for.
    """
    own = folder / wanted.name
    originals = [sorted(own.glob(name)) for name in wanted.files]
    anything = [[own]] if own.is_dir() else []
    named = [[file] for suffix in DATA_SUFFIXES if (file := folder / f"{wanted.name}{suffix}").is_file()]
    beside = [sorted(folder.glob(name)) for name in wanted.files if name not in shared_names]
    found = next(filter(None, [*originals, *anything, *named, *beside]), None)
    if found is None:
        names = " or ".join(wanted.files) or "its files"
        raise DataError(
            f"{folder} has no {wanted.name}.jsonl (.json, .parquet); put it there, or {names} into {own}, or name it "
            f"with files={{{wanted.name}: PATH}}"
        )
    return [str(file) for file in found]


def sources_on_hub(wanted: PublicSet) -> list[str]:
    """What `read_rows` reads the set from; loose files are fetched.

    Raises:
        DataError: the Hub cannot be reached, or no longer has them.
    """
    if not wanted.hub_files:
        return [f"{PREFIX}{wanted.hub}"]
    from huggingface_hub import hf_hub_download

    try:
        return [hf_hub_download(wanted.hub, name, repo_type="dataset") for name in wanted.hub_files]
    except Exception as error:  # of many kinds, for names, networks and files
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise DataError(
            f"{PREFIX}{wanted.hub}: cannot be read from the Hub ({type(error).__name__}: {reason}); check the network, "
            "or download it"
        ) from error
