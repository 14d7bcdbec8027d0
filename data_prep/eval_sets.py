"""Make the public prompt sets: `python -m data_prep.eval_sets [sets=[gsm8k,mt-bench]] [files_dir=DIR]`.

Reads each set from the Hub, or from the files that its authors publish, words the prompts as the published measurements
do, and writes output_dir/SET.jsonl, one {"id", "turns"} a line, for eval.py with eval.prompts_dir=output_dir. What
manifest.json describes and has not changed is not fetched again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from deepspec.arguments import run_command
from deepspec.config import ConfigError, near_match
from deepspec.data.jsonl import DataError
from deepspec.evaluation.public_sets import PUBLIC_SETS, PublicSet
from deepspec.evaluation.set_building import build_set, sources_on_disk, sources_on_hub
from deepspec.files import match_digests, sha256_of, write_atomically

MANIFEST = "manifest.json"
KNOWN = {known.name: known for known in PUBLIC_SETS}
console = Console(soft_wrap=True, highlight=False, markup=False)


@dataclass
class EvalSetsOptions:
    """Prompt sets of the public benchmarks, worded as published measurements word them."""

    sets: list[str] = field(default_factory=list)  # names; [] = all
    files_dir: str | None = None  # folder with the original files, nothing is fetched then; null = from the Hub
    files: dict[str, str] = field(default_factory=dict)  # by set, where its rows are: a file, folder or hub:OWNER/NAME
    published_order: bool = False  # shuffle long sets so that their first prompts are those of published numbers
    output_dir: str = "outputs/eval_sets"


def main(options: EvalSetsOptions) -> None:
    """
    Raises:
        ConfigError: an unknown set.
        DataError: sets that could not be made; those that could are written.
    """
    wanted = wanted_sets(options)
    missing = []
    for name in wanted:
        try:
            console.print(f"{name}: {make_set(KNOWN[name], options, shared_names(wanted))}")
        except DataError as error:
            missing.append(name)
            originals = " or ".join(KNOWN[name].files) or f"{name}.jsonl"
            hint = f"; then give files_dir=DIR with its {originals} in DIR/{name}" if options.files_dir is None else ""
            console.print(f"{name}: not made: {error}{hint if name not in options.files else ''}")
    if missing:
        raise DataError(f"{len(missing)} of {len(wanted)} sets were not made: {', '.join(missing)}; see above")


def wanted_sets(options: EvalSetsOptions) -> list[str]:
    for key, names in (("sets", options.sets), ("files", options.files)):
        for name in names:
            if name not in KNOWN:
                raise ConfigError(
                    f"{key}: no public set '{name}'; there are {', '.join(KNOWN)}.{near_match(name, KNOWN)}"
                )
    return list(dict.fromkeys(options.sets or options.files or KNOWN))


def shared_names(wanted: list[str]) -> set[str]:
    """Names of original files that could be another of the sets' as well, like test.jsonl."""
    return {
        name
        for of_set in wanted
        for name in KNOWN[of_set].files
        for another in wanted
        for other in KNOWN[another].files
        if another != of_set and (fnmatch(name, other) or fnmatch(other, name))
    }


def make_set(wanted: PublicSet, options: EvalSetsOptions, shared: set[str]) -> str:
    """Make one set, and describe it in a line."""
    folder = Path(options.output_dir)
    file = folder / f"{wanted.name}.jsonl"
    from_hub = wanted.name not in options.files and options.files_dir is None
    if from_hub and (known := _as_described(folder, wanted, options)):
        return f"{known} prompts in {file}, nothing to do"
    if wanted.name in options.files:
        sources = [options.files[wanted.name]]
    elif options.files_dir is not None:
        sources = sources_on_disk(wanted, Path(options.files_dir), shared)
    else:
        sources = sources_on_hub(wanted)
    built = build_set(wanted, sources, published_order=options.published_order)
    write_atomically(file, built.text())
    entry = {
        "prompts": len(built.rows),
        "sha256": sha256_of(file),
        "hub": wanted.hub if from_hub else None,
        "sources": built.sources,
        "published_order": options.published_order,
        "differs": built.warning,
    }
    write_atomically(folder / MANIFEST, json.dumps({"sets": _manifest(folder) | {wanted.name: entry}}, indent=2) + "\n")
    verdict = f"; warning: {built.warning}" if built.warning else ", as published" if wanted.sha256 else ""
    return f"{len(built.rows)} prompts in {file}{verdict}"


def _as_described(folder: Path, wanted: PublicSet, options: EvalSetsOptions) -> int | None:
    """How many prompts an earlier call fetched, if they are what this one would write."""
    entry = _manifest(folder).get(wanted.name, {})
    if (entry.get("hub"), entry.get("published_order")) != (wanted.hub, options.published_order):
        return None
    return entry["prompts"] if match_digests(folder, {f"{wanted.name}.jsonl": entry["sha256"]}) else None


def _manifest(folder: Path) -> dict[str, Any]:
    """What earlier calls wrote, by set."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sets"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


if __name__ == "__main__":
    run_command(main, EvalSetsOptions)
