"""A corpus and trained drafts of the built-in target, made once in a run of the tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from engines import HERE, run

from deepspec.drafts.loading import find_draft_folder

RECIPES = {"dflash": "smoke_dflash_fill_in", "eagle3": "smoke_eagle3"}
STEPS = 150


@cache
def corpus() -> Path:
    """The built-in corpus."""
    folder = Path(_kept().name, "corpus")
    run(HERE, "-m", "data_prep.corpus", f"output_dir={folder}")
    return folder


@cache
def trained_draft(algorithm: str) -> Path:
    """The folder of a draft of the built-in target; DFlash is of the fill-in convention."""
    return train([f"recipes={RECIPES[algorithm]}"], Path(_kept().name, algorithm), STEPS)


def data_words() -> list[str]:
    """What train.py needs to read the corpus."""
    return [f"data.train_files=[{corpus() / 'train.jsonl'}]", f"data.eval_files=[{corpus() / 'heldout.jsonl'}]"]


def train(words: list[str], folder: Path, steps: int) -> Path:
    """The folder of the draft that comes out."""
    schedule = [f"train.{name}={steps}" for name in ("steps", "save_steps", "eval_steps")]
    run(HERE, "train.py", *words, "target.dtype=float32", *data_words(), *schedule, f"output_dir={folder}")
    return find_draft_folder(folder)


@cache
def _kept() -> TemporaryDirectory[str]:
    """Gone when Python ends."""
    return TemporaryDirectory(prefix="deepspec-real-")
