"""Show training data as the trainer sees it: `python -m data_prep.inspect [recipes=NAME] [key=value ...]`.

Takes the keys of the training run, and samples, skip and plot. Prints samples token by token with what is supervised,
counts, what is dropped and cut and why, and draws a histogram of lengths. Reads the target's tokenizer, no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from deepspec.cli import run_hydra
from deepspec.config import ConfigError, InspectRun
from deepspec.data.dataset import tokenized_rows
from deepspec.data.jsonl import DataError
from deepspec.data.rendering import template_name
from deepspec.data.templates import ChatTemplate
from deepspec.plotting import PALETTE, figure_of
from deepspec.targets import load_tokenizer

BORDER = "\u00b7"  # between tokens
OPEN, CLOSE = "\u27e6", "\u27e7"  # around what is supervised, for those who see no colours
PLACE = re.compile(r"^.*?, (?:line|row) \d+(?: \(line \d+\))?: ")

console = Console()


def main(run: InspectRun) -> None:
    target, data = run.target, run.data
    tokenizer = load_tokenizer(
        target.path, revision=target.revision, gguf_file=target.gguf_file, chat_template=data.chat_template
    )
    template = ChatTemplate(tokenizer, data.template_options, data.system_prompt, template_name(data, target))
    rows = tokenized_rows(data.train_files, template, max_length=data.max_length, on_bad_row="skip")
    of_rows = list(rows["problem"])
    problems = list(filter(None, of_rows))
    samples = rows.select(np.flatnonzero([not problem for problem in of_rows]))
    for row in samples.select(range(run.skip, min(run.skip + run.samples, len(samples)))) if len(samples) else []:
        show_sample(tokenizer, row, data.min_supervised_tokens)
    show_counts(run, samples, len(problems))
    show_problems(problems)
    if not len(samples):
        raise DataError(f"{', '.join(data.train_files)}: no row can be used; the reasons are above")
    draw_lengths(samples, run.plot)
    console.print(f"lengths: {run.plot}", markup=False)


def show_sample(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], min_supervised: int) -> None:
    """One sample: green and in brackets what is supervised, a dot between tokens."""
    notes = [f"{row['tokens']} tokens", f"{row['supervised']} supervised"]
    if row["truncated"]:
        notes.append("cut at data.max_length")
    if row["supervised"] < min_supervised:
        notes.append(f"dropped: fewer than data.min_supervised_tokens={min_supervised} supervised")
    console.rule(align="left")
    console.print(f"{row['id']}: {', '.join(notes)}", markup=False, highlight=False, soft_wrap=True)
    console.print(as_text(tokenizer, row["input_ids"], row["loss_mask"]), soft_wrap=True)


def as_text(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], loss_mask: list[int]) -> Text:
    """Tokens with their borders; a token that is no whole character is shown as the tokenizer spells it."""
    text = Text()
    for supervised, run in groupby(zip(input_ids, loss_mask, strict=True), lambda pair: pair[1]):
        pieces = [_spelled(tokenizer, token) for token, _ in run]
        style = "bold green" if supervised else "dim"
        text.append(OPEN if supervised else "", style)
        for number, piece in enumerate(pieces):
            text.append(BORDER if number else "", "cyan")
            text.append(piece, style)
        text.append(CLOSE if supervised else "", style)
    return text


def _spelled(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    piece = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in piece else piece


def show_counts(run: InspectRun, samples: datasets.Dataset, problems: int) -> None:
    columns = samples.with_format("numpy")
    tokens, supervised = np.asarray(columns["tokens"][:]), np.asarray(columns["supervised"][:])
    cut = int(np.asarray(columns["truncated"][:]).sum())
    short = int((supervised < run.data.min_supervised_tokens).sum())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_row("samples", f"{len(samples):,}")
    table.add_row("rows that cannot be used", f"{problems:,}")
    table.add_row(f"cut at data.max_length={run.data.max_length}", f"{cut:,}")
    table.add_row(f"dropped, under data.min_supervised_tokens={run.data.min_supervised_tokens}", f"{short:,}")
    if len(samples):
        middle, long = np.percentile(tokens, [50, 95])
        share = supervised.sum() / max(1, tokens.sum())
        table.add_row("tokens", f"{tokens.sum():,}")
        table.add_row("of them supervised", f"{supervised.sum():,} ({share:.1%})")
        table.add_row("tokens of a sample", f"median {middle:,.0f}, 95% up to {long:,.0f}, longest {tokens.max():,}")
    console.rule("counts", align="left")
    console.print(table)


def show_problems(problems: list[str]) -> None:
    """Why rows cannot be used: every reason once, with its number and the first row."""
    reasons = Counter(PLACE.sub("", problem) for problem in problems)
    for reason, count in reasons.most_common():
        first = next(problem for problem in problems if problem.endswith(reason))
        console.print(f"{count:,} x {first}", markup=False, soft_wrap=True)


def draw_lengths(samples: datasets.Dataset, path: str) -> None:
    columns = samples.with_format("numpy")
    tokens, supervised = np.asarray(columns["tokens"][:]), np.asarray(columns["supervised"][:])
    bins = np.histogram_bin_edges(tokens, bins=min(60, max(5, len(np.unique(tokens)))))
    file = Path(path)
    if file.suffix.lower() != ".png" or file.is_dir():
        raise ConfigError(f"plot={path}: must be a file that ends in .png")
    file.parent.mkdir(parents=True, exist_ok=True)
    with figure_of(file, 7, 4, "Lengths of the samples") as figure:
        axes = figure.subplots()
        for values, label, colour in zip((tokens, supervised), ("all tokens", "supervised"), PALETTE, strict=False):
            axes.hist(values, bins=bins.tolist(), histtype="stepfilled", alpha=0.5, label=label, color=colour)
        axes.set(xlabel="Tokens of a sample", ylabel="Samples")
        axes.legend()


if __name__ == "__main__":
    ConfigStore.instance().store(name="train_schema", node=InspectRun)  # configs/inspect.yaml builds on train.yaml
    run_hydra(main, "inspect", InspectRun)
