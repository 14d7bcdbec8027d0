"""Mix prompts from any sources: `python -m data_prep.prompts sources=[mine.jsonl,hub:OWNER/NAME] proportions=[3,1]`.

Output: train.jsonl and heldout.jsonl (conversations up to the last user turn, to be answered by the target),
removed.jsonl (what was left out and why) and manifest.json. Skipped when the manifest matches the settings, the content
of the sources and the files. See docs/data.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deepspec.arguments import run_command
from deepspec.config import ConfigError
from deepspec.data.contamination import EvaluationPrompts, evaluation_files
from deepspec.data.formats import read_conversations
from deepspec.data.hub import PREFIX
from deepspec.data.jsonl import DataError
from deepspec.data.prompt_pool import PromptPool
from deepspec.data.sources import source_digest
from deepspec.files import match_digests, open_atomically, sha256_of, write_atomically

PUBLISHED_MIX = "hub:mlabonne/open-perfectblend"  # what the DSpark paper's drafts were trained on
FILES = ("train.jsonl", "heldout.jsonl", "removed.jsonl")
FORMAT = 1  # of the output; another one is made anew
SECONDS_BETWEEN_LINES = 10.0
console = Console()


@dataclass
class PromptsOptions:
    """Prompts for the target to answer: mixed, without duplicates, without evaluation prompts, split into two parts."""

    sources: list[str] = field(default_factory=lambda: [PUBLISHED_MIX])  # files, folders, patterns, hub:OWNER/NAME
    proportions: list[float] | None = None  # of the sources, in their order; null = all that each has
    count: int | None = None  # prompts of both parts together; null = as many as the proportions allow
    limit: int | None = None  # rows read of every source, from its start; null = all
    output_dir: str = "outputs/prompts"
    eval_dir: str | None = None  # folder of evaluation sets that must not be trained on, JSONL of {"turns": [...]}
    near_duplicates: float = 0.8  # Jaccard similarity from which one of two prompts is removed; 1 = exact ones only
    held_out_fraction: float = 0.05  # of the first user turns
    on_bad_row: str = "skip"  # skip: list it in removed.jsonl; error: stop
    seed: int = 0  # decides the draw, the order and the split


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def check(options: PromptsOptions) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        ConfigError: naming the key.
    """
    if not options.sources:
        raise ConfigError("sources=[]: name at least one file, folder, pattern or hub:OWNER/NAME")
    if repeated := sorted({source for source in options.sources if options.sources.count(source) > 1}):
        raise ConfigError(f"sources: {repeated[0]} is named twice; name it once, with its share in proportions=")
    shares = options.proportions
    if shares is not None and (len(shares) != len(options.sources) or min(shares) <= 0):
        raise ConfigError(
            f"proportions={shares}: expected a number above 0 for each of the {len(options.sources)} sources, in order"
        )
    for name in ("count", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1, or null")
    if not 0 < options.near_duplicates <= 1:
        raise ConfigError(f"near_duplicates={options.near_duplicates}: a Jaccard similarity, above 0 and at most 1")
    if not 0 <= options.held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction={options.held_out_fraction}: a share, at least 0 and below 1")
    if options.on_bad_row not in ("skip", "error"):
        raise ConfigError(f"on_bad_row={options.on_bad_row}: skip or error")


@contextmanager
def progress(source: str) -> Iterator[Callable[[int, int], None]]:
    """What is read and kept of a source: a bar in a terminal, plain lines elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    started = told = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(source, total=None)

        def show(read: int, kept: int) -> None:
            nonlocal told
            now = time.monotonic()
            text = f"{source}: {read:,} rows read, {kept:,} kept, {read / max(now - started, 1e-9):,.0f} rows/s"
            if console.is_terminal:
                bar.update(task, description=text)
            elif now - told > SECONDS_BETWEEN_LINES:
                told = now
                say(text)

        yield show


def fill(pool: PromptPool, options: PromptsOptions) -> dict[str, int]:
    """Read every source into the pool. Returns the rows read of each.

    Raises:
        DataError: of a source, or with on_bad_row=error of a row.
    """
    rows = {}
    for source in options.sources:
        before, read = len(pool), 0
        on_bad_row = None if options.on_bad_row == "error" else lambda error, of=source: pool.refuse(of, error)
        with progress(source) as show:
            conversations = read_conversations([source], on_format=say, on_bad_row=on_bad_row)
            for read, conversation in enumerate(islice(conversations, options.limit), start=1):
                pool.add(source, conversation)
                if read % 256 == 0:
                    show(read, len(pool) - before)
        rows[source] = read + pool.removed[source, "bad_row"]
    return rows


def make(options: PromptsOptions) -> dict[str, Any]:
    """Write the three files. Returns the counts for the manifest."""
    folder = Path(options.output_dir)
    evaluation = None
    if options.eval_dir is None:
        say("eval_dir=null: no evaluation sets are given, so none of their prompts are looked for and removed")
    else:
        evaluation = EvaluationPrompts(evaluation_files(options.eval_dir), say)
    with (
        open_atomically(folder / "removed.jsonl") as removed,
        TemporaryFile(dir=folder) as prompts,  # without a name: a killed run leaves nothing
        TemporaryFile(dir=folder) as signatures,
    ):
        pool = PromptPool(
            prompts,
            signatures,
            removed,
            seed=options.seed,
            held_out_fraction=options.held_out_fraction,
            evaluation=evaluation,
        )
        rows = fill(pool, options)
        pool.drop_near_duplicates(options.near_duplicates)
        chosen, short = pool.draw(options.count, options.proportions)
        for line in short:
            say(line)
        if not len(chosen):
            why = ", ".join(f"{count} {reason}" for (_, reason), count in sorted(pool.removed.items()))
            raise DataError(f"{', '.join(options.sources)}: no prompt is left; removed: {why}")
        with open_atomically(folder / "train.jsonl") as train, open_atomically(folder / "heldout.jsonl") as held_out:
            parts = pool.write(chosen, train, held_out)
    counts: dict[str, dict[str, Any]] = {}
    for source in options.sources:
        removed_for = {reason: count for (name, reason), count in sorted(pool.removed.items()) if name == source}
        kept = {part: parts[part][source] for part in parts}
        not_drawn = rows[source] - sum(removed_for.values()) - sum(kept.values())
        counts[source] = {"rows": rows[source], **kept, "not_drawn": not_drawn, "removed": removed_for}
    return {"counts": counts, "short": short}


def inputs_of(options: PromptsOptions, known: dict[str, str]) -> dict[str, str]:
    """The digest of everything that is read.

    Args:
        known: of the last run; a set on the Hub that is there counts as unchanged where the Hub cannot be asked.
    """
    digests = {}
    for source in options.sources:
        try:
            digests[source] = source_digest(source)
        except DataError:
            if not source.startswith(PREFIX) or source not in known:
                raise
            say(f"{source}: the Hub cannot be asked whether it changed; taken as unchanged")
            digests[source] = known[source]
    evaluation = evaluation_files(options.eval_dir) if options.eval_dir is not None else []
    return digests | {str(file): sha256_of(file) for file in evaluation}


def main(options: PromptsOptions) -> None:
    check(options)
    folder = Path(options.output_dir)
    manifest = folder / "manifest.json"
    written = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    settings = {key: value for key, value in asdict(options).items() if key != "output_dir"}
    record: dict[str, Any] = {"format": FORMAT, "settings": settings}
    record["inputs"] = inputs_of(options, written.get("inputs", {}))
    if {**written, **record} == written and match_digests(folder, written["sha256"]):
        say(f"prompts: {folder} is valid, nothing to do")
        return
    record |= make(options)
    record["sha256"] = {name: sha256_of(folder / name) for name in FILES}
    write_atomically(manifest, json.dumps(record, indent=2))
    for source, counts in record["counts"].items():
        removed = ", ".join(f"{count} {reason}" for reason, count in counts["removed"].items()) or "none"
        say(
            f"{source}: {counts['rows']} rows, {counts['train']} to train on, {counts['heldout']} held out, "
            f"{counts['not_drawn']} not drawn; removed: {removed}"
        )
    say(f"prompts: {folder}: what was removed and why is in removed.jsonl")


if __name__ == "__main__":
    run_command(main, PromptsOptions)
