"""Tokenizing and masking against `datasets.map` over `apply_chat_template`: `python -m benchmarks.tokenizing`.

Interleaved: each round tokenizes the same conversations under a template with markers in the ways of the library (row
by row, in batches) and ours, and ours once more without markers, which the library cannot mask.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from deepspec.arguments import run_command
from deepspec.data.jsonl import read_jsonl
from deepspec.data.templates import ChatTemplate
from deepspec.data.tokenized import tokenized_rows
from deepspec.data.tokenizer import CHAT_TEMPLATE
from deepspec.environment import command_line, machine, versions
from deepspec.files import write_atomically
from deepspec.targets import load_tokenizer

PLAIN = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
BATCH = 256  # rows


@dataclass
class TokenizingOptions:
    """Rows a second of both, on the first conversations of a file, repeated to one to three turns."""

    file: str = "outputs/corpus/train.jsonl"
    tokenizer: str = "builtin"  # as target.path
    gguf_file: str | None = None
    rows: int = 4000
    rounds: int = 5
    output: str = "benchmarks/results/tokenizing_cpu.json"


def by_library(path: Path, tokenizer: PreTrainedTokenizerBase, folder: str, *, batched: bool) -> int:
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)

    def render(row: dict) -> dict:
        encoded: Any = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "loss_mask": encoded["assistant_masks"]}

    cache = f"{folder}/mapped.arrow"
    return len(rows.map(render, batched=batched, batch_size=BATCH, remove_columns=["messages"], cache_file_name=cache))


def by_us(path: Path, tokenizer: PreTrainedTokenizerBase, folder: str) -> int:
    return len(tokenized_rows([str(path)], ChatTemplate(tokenizer), max_length=10**6, cache_dir=folder))


def rows_of(options: TokenizingOptions) -> list[dict]:
    rows = [row for _, (_, row) in zip(range(options.rows), read_jsonl(options.file), strict=False)]
    return [{"messages": row["messages"] * (1 + number % 3)} for number, row in enumerate(rows)]


def main(options: TokenizingOptions) -> None:
    datasets.disable_progress_bars()
    console = Console()
    tokenizer = load_tokenizer(options.tokenizer, gguf_file=options.gguf_file)
    rows = rows_of(options)
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        ways: dict[str, tuple[str, Callable[[str], int]]] = {
            "datasets.map, row by row": (CHAT_TEMPLATE, lambda at: by_library(path, tokenizer, at, batched=False)),
            "datasets.map, in batches": (CHAT_TEMPLATE, lambda at: by_library(path, tokenizer, at, batched=True)),
            "ours, with markers": (CHAT_TEMPLATE, lambda at: by_us(path, tokenizer, at)),
            "ours, without markers": (PLAIN, lambda at: by_us(path, tokenizer, at)),
        }
        for number in range(options.rounds):
            for name, (template, way) in ways.items():
                tokenizer.chat_template = template
                started = time.perf_counter()
                count = way(tempfile.mkdtemp(dir=folder))
                speeds.setdefault(name, []).append(count / (time.perf_counter() - started))
                console.print(f"round {number + 1}, {name}: {speeds[name][-1]:,.0f} rows/s", highlight=False)
    base = speeds["datasets.map, row by row"]
    table = Table("way", "rows/s", "against row by row", "least", "most", title="medians")
    results = {}
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        results[name] = {"rows_per_second": values, "ratios": ratios}
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(name, f"{statistics.median(values):,.0f}", *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    record = {
        "command": command_line(),
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(options),
        "results": results,
    }
    write_atomically(options.output, json.dumps(record, indent=2))


if __name__ == "__main__":
    run_command(main, TokenizingOptions)
