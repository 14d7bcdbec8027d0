"""Rounds that an evaluation recorded, read for calibration and refused where they would mislead.

A calibration split is a prompt set whose name begins with `calibration`. The prompts themselves are compared too: one
that also stands in any other set beside it is refused, so that no evaluation prompt tunes what evaluations measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.data.jsonl import DataError, read_jsonl
from deepspec.data.prompts import read_prompt
from deepspec.decoding.calibration import RecordedRounds
from deepspec.files import match_digests

CALIBRATION_SETS = "calibration"  # what their names begin with
ROUNDS_FILE, METRICS_FILE = "rounds.jsonl", "metrics.json"  # as an evaluation writes them


@dataclass(frozen=True)
class Source:
    """An evaluation's rounds and where they come from."""

    rounds: RecordedRounds
    description: dict[str, Any]  # folder, prompts per set, sampling temperatures, verification rule, command


def read_source(
    folder: str | Path, draft_folder: Path, *, temperature: float | None = None, prompts_dir: str | Path | None = None
) -> Source:
    """Read the rounds of a finished evaluation.

    Args:
        folder: output_dir of eval.py.
        draft_folder: of the draft that is to be calibrated.
        temperature: only prompts sampled at it; None = all.
        prompts_dir: where the sets lie; None = where the evaluation found them.

    Raises:
        DataError: no finished evaluation of this draft there; evaluation prompts among the prompts; rounds that do not
            verify whole blocks, have no confidences, or are too damaged to read.
    """
    folder = Path(folder)
    metrics = metrics_of(folder)
    try:
        weights, block_size = metrics["draft"]["weights"], metrics["draft"]["block_size"]
        settings, digest = metrics["settings"], metrics["settings_digest"]
        prompts_dir = Path(prompts_dir or settings["eval.prompts_dir"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / METRICS_FILE}: not the metrics of an evaluation ({error} is missing)") from error
    if not weights or not match_digests(draft_folder, weights):
        raise DataError(f"rounds={folder}: decoded with other weights than {draft_folder} holds; evaluate this draft")
    records = [
        (place, row)
        for place, row in read_jsonl(folder / ROUNDS_FILE)
        if row.get("settings") == digest and temperature in (None, row.get("temperature"))
    ]
    if not records:
        at = "" if temperature is None else f" at temperature {temperature:g}"
        raise DataError(f"{folder / ROUNDS_FILE}: holds no rounds of this evaluation{at}")
    sets = list(dict.fromkeys(str(row.get("set_name")) for _, row in records))
    check_sets(sets, prompts_dir)
    rounds, prompts = _rounds_of(records, block_size)
    description = {
        "folder": str(folder),
        "sets": {name: prompts[name] for name in sets},
        "temperatures": sorted({row["temperature"] for _, row in records}),
        "verification": settings.get("decode.verification"),
        "command": metrics.get("command"),
    }
    return Source(rounds, description)


def metrics_of(folder: Path) -> dict[str, Any]:
    """The metrics of a finished evaluation.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    try:
        return json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"rounds={folder}: no {METRICS_FILE}; give the output_dir of a finished eval.py") from error
    except ValueError as error:
        raise DataError(f"{folder / METRICS_FILE}: damaged ({error}); run the evaluation again") from error


def check_sets(names: list[str], prompts_dir: Path) -> None:
    """Refuse sets that are not calibration splits, by name and by content.

    Raises:
        DataError: saying which set, and which prompt stands where else.
    """
    others = [name for name in names if not name.startswith(CALIBRATION_SETS)]
    if others:
        raise DataError(
            f"the rounds are of {', '.join(others)}: evaluation prompts must not tune what they measure. Decode a "
            f"calibration split, a prompt set whose name begins with '{CALIBRATION_SETS}': eval.py "
            f"eval.sets=[{CALIBRATION_SETS}_math,...]"
        )
    evaluated = {
        turn: place
        for file in sorted(prompts_dir.glob("*.jsonl"))
        if not file.stem.startswith(CALIBRATION_SETS)
        for place, row in read_jsonl(file)
        if (turn := _first_turn(row, place))
    }
    for name in names:
        file = prompts_dir / f"{name}.jsonl"
        if not file.is_file():
            raise DataError(
                f"{file}: no such set, so it cannot be compared with the evaluation sets; say where with prompts_dir="
            )
        for place, row in read_jsonl(file):
            if (turn := _first_turn(row, place)) in evaluated:
                raise DataError(f"{place}: also an evaluation prompt ({evaluated[turn]}); remove it here")


def _first_turn(row: dict[str, Any], place: str) -> str | None:
    """None where the row is no prompt."""
    try:
        return read_prompt(row, place).first_turn.strip()
    except DataError:
        return None


def _rounds_of(records: list[tuple[str, dict[str, Any]]], block_size: int) -> tuple[RecordedRounds, dict[str, int]]:
    """All rounds, and the number of prompts of each set."""
    confidences, counts, prompts = [], [], []
    prompts_of: dict[str, int] = {}
    for place, row in records:
        try:
            completions = row["speculative"]["completions"]
            turns = row.get("turns") or [1] * len(completions)  # of each prompt; earlier versions decoded one
            if sum(turns) != len(completions):
                raise DataError(f"{place}: {sum(turns)} turns, but {len(completions)} completions; evaluate again")
            owners = [prompt for prompt, count in enumerate(turns, sum(prompts_of.values())) for _ in range(count)]
            prompts_of[row["set_name"]] = prompts_of.get(row["set_name"], 0) + len(turns)
            for number, completion in zip(owners, completions, strict=True):
                for proposed, accepted, given in whole_blocks(completion, block_size, place):
                    confidences.append(given + [np.nan] * (block_size - proposed))
                    counts.append((proposed, accepted))
                    prompts.append(number)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: not a record of an evaluation ({type(error).__name__}: {error})") from error
    if not counts:
        raise DataError("the prompts ended before a single round; decode longer answers")
    proposed, accepted = np.array(counts, dtype=np.int64).T
    matrix = np.array(confidences, dtype=np.float64)
    return RecordedRounds(matrix, proposed, accepted, np.array(prompts, dtype=np.int64)), prompts_of


def whole_blocks(completion: dict[str, Any], block_size: int, place: str) -> Iterator[tuple[int, int, list[float]]]:
    """Proposed, accepted and confidences of each round; only the last may be short, cut by a stop token or the end.

    Raises:
        DataError: other rounds are short, or there are no confidences.
    """
    rounds = completion["rounds"]
    if completion["finish_reason"] == "error":
        return
    for number, entry in enumerate(rounds, start=1):
        proposed, accepted, confidences = entry["proposed"], entry["accepted"], entry["confidences"]
        if confidences is None:
            raise DataError(f"{place}: rounds without confidences; this draft has no confidence head to calibrate")
        if len(confidences) < proposed:
            raise DataError(f"{place}: {proposed} tokens proposed, but {len(confidences)} confidences")
        if proposed < block_size and number < len(rounds):
            raise DataError(
                f"{place}: a round of {proposed} tokens where the block has {block_size}. What a policy cuts off by "
                "the confidences biases the sample: decode the calibration split with whole blocks "
                "(decode.policy=fixed, decode.confidence_threshold=0)"
            )
        if proposed:
            yield proposed, accepted, list(confidences[:proposed])
