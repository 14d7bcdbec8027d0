"""Write the built-in corpus: `python -m data_prep.corpus [output_dir=outputs/corpus] [seed=0]`.

Output: train.jsonl and heldout.jsonl (conversations), prompts/{math,code,chat}.jsonl (held-out prompts for evaluation),
prompts/calibration_{math,code,chat}.jsonl (other held-out prompts, to calibrate confidences) and manifest.json.
Skipped when the manifest matches the settings, this Python and the files.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import print

from deepspec.arguments import run_command
from deepspec.data.corpus import SETS, build_corpus
from deepspec.data.jsonl import read_jsonl
from deepspec.files import match_digests, sha256_of, write_atomically


@dataclass
class CorpusOptions:
    """Real text that every Python ships, as chat conversations, split by document into train and held-out."""

    output_dir: str = "outputs/corpus"
    seed: int = 0  # decides the split, the order and the word problems
    held_out_fraction: float = 0.05  # of documents
    calibration_fraction: float = 0.25  # of the held-out prompts of each set
    math_problems: int = 6000


def write_prompts(folder: Path, calibration_fraction: float) -> None:
    """prompts/SET.jsonl: the first user turn of each held-out conversation, as {"turns": [...]}.

    The last `calibration_fraction` of each set goes to prompts/calibration_SET.jsonl instead.
    """
    prompts: dict[str, list[str]] = {name: [] for name in SETS}
    for _, row in read_jsonl(folder / "heldout.jsonl"):
        prompts[row["set"]].append(row["messages"][0]["content"])
    for name, questions in prompts.items():
        evaluated = len(questions) - round(calibration_fraction * len(questions))
        for_calibration = [q for q in questions[evaluated:] if q not in questions[:evaluated]]
        for file, chosen in ((name, questions[:evaluated]), (f"calibration_{name}", for_calibration)):
            lines = [json.dumps({"turns": [question]}) + "\n" for question in chosen]
            write_atomically(folder / "prompts" / f"{file}.jsonl", "".join(lines))


def main(options: CorpusOptions) -> None:
    folder = Path(options.output_dir)
    prompt_files = [f"prompts/{prefix}{name}.jsonl" for name in SETS for prefix in ("", "calibration_")]
    files = ["train.jsonl", "heldout.jsonl", *prompt_files]
    settings = {**asdict(options), "python": platform.python_version()}
    manifest = folder / "manifest.json"
    if manifest.is_file():
        written = json.loads(manifest.read_text(encoding="utf-8"))
        if written["settings"] == settings and match_digests(folder, written["sha256"]):
            print(f"corpus: {folder} is valid, nothing to do")
            return
    counts = build_corpus(
        folder, seed=options.seed, held_out_fraction=options.held_out_fraction, math_problems=options.math_problems
    )
    write_prompts(folder, options.calibration_fraction)
    record = {"settings": settings, "counts": counts, "sha256": {name: sha256_of(folder / name) for name in files}}
    write_atomically(manifest, json.dumps(record, indent=2))
    print(f"corpus: {folder}: {counts}")


if __name__ == "__main__":
    run_command(main, CorpusOptions)
