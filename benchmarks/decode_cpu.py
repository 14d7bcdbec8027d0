"""Tokens per second of the built-in target, decoded in several ways, interleaved in one run.

    python -m benchmarks.decode_cpu checkpoint=outputs/demo/smoke [repeats=5] [prompts=8] [max_new_tokens=64]

Each repeat decodes the same prompts in every way, one after the other, so a slow spell of the machine hits all of them.
Printed and written as JSON: median, smallest and largest tokens/s, and the ratio to `transformers` generate by pairs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from deepspec import load_draft
from deepspec.arguments import run_command
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.evaluation.environment import command_line, machine, versions
from deepspec.evaluation.sets import load_set
from deepspec.files import write_atomically
from deepspec.targets import Target, load_target, load_tokenizer

Decode = Callable[[], int]  # returns the number of tokens it made
BASELINE = "transformers generate, batch 1"


@dataclass
class BenchmarkOptions:
    """Plain and speculative decoding at batch 1 and 8 against `transformers` generate."""

    checkpoint: str = "???"  # draft folder or run folder
    target: str = "builtin"
    prompts_dir: str = "outputs/corpus/prompts"
    sets: str = "math,code,chat"
    prompts: int = 8  # per set
    max_new_tokens: int = 64  # per prompt; no stop token, so that every way makes the same number
    temperature: float = 1.0
    repeats: int = 5  # counted; one more goes first as a warm-up
    output: str = "outputs/benchmarks/decode_cpu.json"


def ways_to_decode(options: BenchmarkOptions, target: Target, requests: list[Request]) -> dict[str, Decode]:
    proposer = DSparkProposer(load_draft(options.checkpoint, target=target), target)
    longest = max(len(request.prompt_ids) for request in requests)

    def engine(slots: int, with_draft: bool) -> Decode:
        def decode() -> int:
            made = SpeculativeEngine(
                target,
                proposer if with_draft else None,
                slots=slots,
                max_length=longest + options.max_new_tokens + proposer.block_size,
            ).generate(requests)
            return sum(len(completion.output_ids) for completion in made)

        return decode

    def generate() -> int:
        made = 0
        for request in requests:
            prompt = torch.tensor([request.prompt_ids])
            sampling: dict[str, Any] = {"do_sample": False}
            if request.temperature:
                sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
            length = options.max_new_tokens
            output = target.model.generate(prompt, min_new_tokens=length, max_new_tokens=length, **sampling)
            made += output.shape[1] - prompt.shape[1]
        return made

    return {
        BASELINE: generate,
        "plain, batch 1": engine(1, with_draft=False),
        "speculative, batch 1": engine(1, with_draft=True),
        "plain, batch 8": engine(8, with_draft=False),
        "speculative, batch 8": engine(8, with_draft=True),
    }


def measure(ways: dict[str, Decode], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each way in each counted repeat."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, decode in ways.items():
            started = time.perf_counter()
            made = decode()
            if repeat:
                speeds[name].append(made / (time.perf_counter() - started))
    return speeds


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(options: BenchmarkOptions) -> None:
    transformers_logging.set_verbosity_error()
    target = load_target(options.target)
    tokenizer = load_tokenizer(options.target)
    names = options.sets.split(",")
    prompts = [p for name in names for p in load_set(name, options.prompts_dir, tokenizer, limit=options.prompts)]
    requests = [
        Request(prompt.ids, options.max_new_tokens, temperature=options.temperature, seed=index)
        for index, prompt in enumerate(prompts)
    ]
    speeds = measure(ways_to_decode(options, target, requests), options.repeats)
    results = {
        name: {
            "tokens_per_second": summary(values),
            "ratio_to_generate": summary([a / b for a, b in zip(values, speeds[BASELINE], strict=True)]),
        }
        for name, values in speeds.items()
    }
    table = Table("decoded with", "tokens/s: median", "min", "max", "times generate: median", "min", "max")
    for name, result in results.items():
        speed, ratio = result["tokens_per_second"], result["ratio_to_generate"]
        row = [f"{speed[key]:.0f}" for key in ("median", "min", "max")]
        table.add_row(name, *row, *(f"{ratio[key]:.2f}" for key in ("median", "min", "max")))
    Console().print(table)
    record = {
        "results": results,
        "settings": asdict(options),
        "requests": len(requests),
        "machine": machine(),
        "versions": versions(),
        "command": command_line(),
    }
    write_atomically(options.output, json.dumps(record, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    run_command(main, BenchmarkOptions)
