"""Decoded records into metrics.json, samples.jsonl and the table of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepspec.decoding import Completion
from deepspec.decoding.recorded_rounds import METRICS_FILE
from deepspec.evaluation.records import Record
from deepspec.evaluation.sets import Prompt
from deepspec.evaluation.statistics import (
    Estimate,
    Pace,
    Resampler,
    cond_accept,
    cond_accept_estimates,
    macro_estimate,
    ratio_estimate,
    reliability,
    speedup_estimate,
    survival,
    tau_of,
    verify_rate,
)
from deepspec.files import write_atomically

SAMPLES_FILE = "samples.jsonl"
SAMPLES_PER_SET = 3


def results_of(
    records: Iterable[Record],
    *,
    sets: Sequence[str],
    temperatures: Sequence[float],
    block_size: int,
    baseline: bool,
    bootstrap_samples: int,
    seed: int,
    skipped: Mapping[str, int],
    asked: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Per temperature: `sets` (name -> metrics of `set_metrics`), `macro`, the mean over the sets, and `reliability` of
    the confidences, pooled over the sets.

    Args:
        skipped: by set, prompts that were too long.
        asked: by set, how many turns each of the others has; None = as many as were decoded.
    """
    grouped: dict[tuple[str, float], list[Record]] = {(s, t): [] for t in temperatures for s in sets}
    for record in sorted(records, key=lambda record: record.start):
        grouped[record.set_name, record.temperature].append(record)
    results = []
    for temperature in temperatures:
        of_sets = {name: grouped[name, temperature] for name in sets}
        resampler = Resampler(bootstrap_samples, seed)
        metrics = {
            name: {"skipped": skipped[name], "skipped_turns": _skipped_turns(chunks, asked[name]) if asked else 0}
            | set_metrics(chunks, block_size=block_size, baseline=baseline, resampler=resampler)
            for name, chunks in of_sets.items()
        }
        macro: dict[str, Any] = {
            "tau": macro_estimate([_tokens_and_rounds(chunks) for chunks in of_sets.values()], resampler).as_dict(),
            "speedup": None,
        }
        if baseline:
            macro["speedup"] = speedup_estimate([_pace(chunks) for chunks in of_sets.values()], resampler).as_dict()
        rounds = [r for chunks in of_sets.values() for completion in _completions(chunks) for r in completion.rounds]
        pooled = reliability(rounds)
        results.append({"temperature": temperature, "macro": macro, "sets": metrics, "reliability": pooled})
    return results


def set_metrics(records: Sequence[Record], *, block_size: int, baseline: bool, resampler: Resampler) -> dict[str, Any]:
    """Everything reported about one set at one temperature.

    Token speeds are per process, over the wall time of whole chunks, prefill included. `identical_to_plain` is the
    share of turns whose greedy output is the same with and without the draft; below 1 only by ties in rounding.
    """
    completions = _completions(records)
    rounds = [r for completion in completions for r in completion.rounds]
    metrics: dict[str, Any] = {
        "prompts": len(_prompts(records)),
        "turns": len(completions),  # of the prompts, that were decoded
        "rounds": len(rounds),
        "output_tokens": sum(len(completion.output_ids) for completion in completions),
        "stopped": sum(completion.finish_reason == "stop" for completion in completions),
        "failed": sum(completion.finish_reason == "error" for completion in completions),
        "tau": ratio_estimate(*_tokens_and_rounds(records), resampler).as_dict(),
        "verify_rate": verify_rate(rounds),
        "cond_accept": cond_accept(rounds, block_size),
        "survival": survival(rounds, block_size),
        "reliability": reliability(rounds),
        "speculative_tokens_per_second": _speed(r.speculative for r in records),
        "plain_tokens_per_second": None,
        "speedup": None,
        "identical_to_plain": None,
    }
    if baseline:
        metrics["plain_tokens_per_second"] = _speed(r.plain for r in records)
        metrics["speedup"] = speedup_estimate([_pace(records)], resampler).as_dict()
        if records[0].temperature == 0:
            metrics["identical_to_plain"] = _identical(records)
    of_prompts = [[r for completion in turns for r in completion.rounds] for turns in _prompts(records)]
    metrics["cond_accept_estimates"] = cond_accept_estimates(of_prompts, block_size, resampler)
    return metrics


def _prompts(records: Iterable[Record]) -> list[list[Completion]]:
    """The turns of each prompt. They are one unit of resampling: rounds of one conversation are not independent."""
    return [turns for record in records for turns in record.by_prompt()]


def _completions(records: Iterable[Record]) -> list[Completion]:
    return [completion for record in records for completion in record.speculative.completions]


def _skipped_turns(records: Iterable[Record], asked: Sequence[int]) -> int:
    """Turns that were not decoded since they had become too long."""
    return sum(
        wanted - len(turns)
        for wanted, turns in zip(asked, _prompts(records), strict=True)
        if turns[-1].finish_reason != "error"
    )


def _tokens_and_rounds(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Per prompt: tokens that rounds emitted, and rounds."""
    rounds = [[r for completion in turns for r in completion.rounds] for turns in _prompts(records)]
    return [float(sum(r.emitted for r in of)) for of in rounds], [float(len(of)) for of in rounds]


def _pace(records: Sequence[Record]) -> Pace:
    plain = [record.plain for record in records if record.plain is not None]
    assert len(plain) == len(records), "a baseline was asked for, so every chunk has one"
    return Pace(
        [record.speculative.tokens for record in records],
        [record.speculative.seconds for record in records],
        [decoding.tokens for decoding in plain],
        [decoding.seconds for decoding in plain],
    )


def _speed(decodings: Iterable[Any]) -> float:
    listed = list(decodings)
    return sum(decoding.tokens for decoding in listed) / sum(decoding.seconds for decoding in listed)


def _identical(records: Sequence[Record]) -> float:
    same = [
        ours.output_ids == theirs.output_ids
        for record in records
        if record.plain is not None
        for ours, theirs in zip(record.speculative.completions, record.plain.completions, strict=True)
    ]
    return sum(same) / len(same)


def samples_of(records: Iterable[Record], prompts: Mapping[str, Sequence[Prompt]], decode: Any) -> list[dict[str, Any]]:
    """The first prompts of each set with what was written: `set`, `temperature`, `prompt`, `text`, `tau`, and of later
    turns `turn`, from 2.

    Args:
        decode: token ids to text.
    """
    rows = []
    for record in sorted(records, key=lambda record: (record.temperature, record.set_name, record.start)):
        for index, turns in enumerate(record.by_prompt(), start=record.start):
            for turn, completion in enumerate(turns if index < SAMPLES_PER_SET else []):
                row = {"set": record.set_name, "temperature": record.temperature}
                row |= {"turn": turn + 1} if turn else {}
                prompt = prompts[record.set_name][index]
                row |= {"prompt": prompt.text_of(turn), "text": decode(completion.output_ids)}
                rows.append(row | {"tau": tau_of(completion.rounds)})
    return rows


def write_results(output_dir: str | Path, metrics: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]) -> None:
    folder = Path(output_dir)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    write_atomically(folder / SAMPLES_FILE, lines)
    write_atomically(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")


def is_other_target(metrics: Mapping[str, Any]) -> bool:
    """Whether the target had other weights than the one that the draft was trained for (`eval.allow_other_target`)."""
    measured, trained = metrics["target"].get("fingerprint"), metrics["draft"].get("target_fingerprint")
    return None not in (measured, trained) and measured != trained


def print_table(metrics: Mapping[str, Any], console: Console) -> None:
    """One row per temperature and set, and the mean over sets."""
    draft = metrics["draft"]
    table = Table(title=f"{draft['name']} ({draft['algorithm']}, {draft['block_size']} tokens per round)")
    for column in (
        "temp.",
        "set",
        "prompts",
        "tau (95% interval)",
        "verify rate",
        "tokens/s",
        "plain",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column == "set" else "right")
    for result in metrics["results"]:
        temperature = f"{result['temperature']:g}"
        for name, values in result["sets"].items():
            numbers = [
                values["verify_rate"],
                values["speculative_tokens_per_second"],
                values["plain_tokens_per_second"],
            ]
            digits = [show_number(number, places) for number, places in zip(numbers, (2, 1, 1), strict=True)]
            tau, speedup = show_estimate(values["tau"]), show_estimate(values["speedup"], "x")
            prompts = f"{values['prompts']}" + _notes(values)
            table.add_row(temperature, name, prompts, tau, *digits, speedup)
        macro = result["macro"]
        mean = show_estimate(macro["tau"]), "", "", "", show_estimate(macro["speedup"], "x")
        table.add_row(temperature, "mean of sets", "", *mean, style="bold", end_section=True)
    console.print(table)


def _notes(values: Mapping[str, Any]) -> str:
    notes = [f"{values['turns']} turns"] if values["turns"] != values["prompts"] else []
    notes += [f"+{values['skipped']} too long"] if values["skipped"] else []
    notes += [f"+{values['skipped_turns']} turns too long"] if values["skipped_turns"] else []
    return f" ({', '.join(notes)})" if notes else ""


def show_number(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def show_estimate(estimate: Estimate | Mapping[str, float | None] | None, unit: str = "") -> str:
    """`3.21 (3.05 to 3.38)`, or `-` when there is no value."""
    values = estimate.as_dict() if isinstance(estimate, Estimate) else estimate
    if not values or values["value"] is None:
        return "-"
    interval = "" if values["low"] is None else f" ({values['low']:.2f} to {values['high']:.2f})"
    return f"{values['value']:.2f}{unit}{interval}"
