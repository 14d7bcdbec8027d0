"""How large a feature cache gets: `python -m data_prep.estimate [recipes=NAME] [key=value ...]`.

Takes the keys of the training run that the cache is for. Reads the target's config and the data, no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from deepspec.cli import run_hydra
from deepspec.config import CacheRun
from deepspec.data.dataset import check_vocabulary
from deepspec.drafts import DraftSettings
from deepspec.features.cache_plan import Survey, free_bytes, survey_datasets
from deepspec.features.cache_storage import STORAGES
from deepspec.targets import load_target_config, load_tokenizer
from deepspec.training.setup import draft_config_of, load_datasets

console = Console()


@dataclass(frozen=True)
class Contents:
    """What the cache of a run holds, whatever it is stored as."""

    tokenizer: PreTrainedTokenizerBase
    layer_ids: list[int]
    hidden_size: int
    survey: Survey

    def document_bytes(self, dtype: str) -> np.ndarray:
        """[documents]"""
        return self.survey.bytes_per_document(STORAGES[dtype], len(self.layer_ids), self.hidden_size)

    def total_bytes(self, dtype: str) -> int:
        return int(self.document_bytes(dtype).sum())


def contents_of(run: CacheRun) -> Contents:
    """Tokenize the run's data and look at every sample.

    Raises:
        ConfigError, ValueError, DataError: as a training run with these keys would.
    """
    target = run.target
    target_config = load_target_config(target.path, target.revision, target.gguf_file)
    tokenizer = load_tokenizer(
        target.path, revision=target.revision, gguf_file=target.gguf_file, chat_template=run.data.chat_template
    )
    check_vocabulary(tokenizer, target_config.vocab_size, run.target.path)
    settings = DraftSettings.of(draft_config_of(run, target_config, tokenizer))
    datasets = [dataset for dataset in load_datasets(run, tokenizer) if dataset is not None]
    return Contents(tokenizer, list(settings.target_layer_ids), target_config.hidden_size, survey_datasets(datasets))


def show_estimate(run: CacheRun, contents: Contents) -> None:
    """Print counts, bytes for every storage, and the free space."""
    survey, layers, hidden = contents.survey, len(contents.layer_ids), contents.hidden_size
    tokens, final = int(survey.tokens.sum()), int(survey.final.sum())
    say(
        f"{survey.samples:,} samples, {len(survey):,} of them different: {tokens:,} tokens, context of "
        f"{int(survey.context.sum()):,}, final states of {final:,}; target layers {contents.layer_ids}, hidden {hidden}"
    )
    table = Table(
        "cache_dtype", "context token", "final state", "whole token", "total", title="bytes by features.cache_dtype"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for dtype, storage in STORAGES.items():
        total = contents.total_bytes(dtype)
        table.add_row(
            dtype,
            f"{storage.context_bytes(layers, hidden):,}",
            f"{storage.final_bytes(hidden):,}",
            f"{total / tokens:,.0f}",
            in_words(total),
        )
    console.print(table)
    folder = Path(run.features.cache_dir)
    say(f"free where features.cache_dir={folder} is: {in_words(free_bytes(folder))}")


def say(text: str) -> None:
    """Print as it is, without breaking lines."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def in_words(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def run_with_training_keys(task: Callable[[CacheRun], Any]) -> None:
    """Compose the config of a training run, with `force`, and run `task` on it."""
    disable_progress_bar()  # Transformers' own, of loading weights
    ConfigStore.instance().store(name="train_schema", node=CacheRun)  # configs/cache.yaml builds on configs/train.yaml
    run_hydra(task, "cache", CacheRun)


def main(run: CacheRun) -> None:
    show_estimate(run, contents_of(run))


if __name__ == "__main__":
    run_with_training_keys(main)
