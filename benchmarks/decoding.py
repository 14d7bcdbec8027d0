"""Tokens per second of the built-in target, decoded in several ways, interleaved in one run.

    python -m benchmarks.decode_cpu checkpoint=outputs/demo/smoke [repeats=5] [prompts=8] [max_new_tokens=128]

Each repeat decodes the same prompts in every way, one after the other, so a slow spell of the machine hits all of them;
ratios are taken within a repeat. Printed and written as JSON: median, smallest and largest tokens/s and ratios, tokens
per round (tau), and how long the parts of a round take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks.summary import spread, summary, write_record
from deepspec import load_draft
from deepspec.arguments import run_command
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine, Timing
from deepspec.decoding.policies import ConfidenceThreshold
from deepspec.evaluation.plan import stop_tokens
from deepspec.evaluation.sets import load_set
from deepspec.targets import Target, load_target, load_tokenizer

TABLE_WIDTH = 125
GENERATE = "generate, batch 1"


@dataclass(frozen=True)
class Run:
    """One decoding of all prompts."""

    tokens: int
    seconds: float
    rounds: int = 0  # of single rows
    emitted: int = 0  # by these rounds
    timing: Timing | None = None


@dataclass(frozen=True)
class Way:
    """A way of decoding, and the name of the way that it should beat."""

    run: Callable[[], Run]
    against: str | None = None


@dataclass
class BenchmarkOptions:
    """Plain and speculative decoding at batch 1 and 8 against `transformers` generate."""

    checkpoint: str = "???"  # draft folder or run folder
    target: str = "builtin"
    prompts_dir: str = "outputs/corpus/prompts"
    sets: str = "math,code,chat"
    prompts: int = 8  # per set
    max_new_tokens: int = 128  # per prompt; answers end earlier at their stop token
    temperature: float = 1.0
    confidence_threshold: float = 0.0  # propose up to the first token below; 0 = all
    verification: str = "token"  # token or block
    repeats: int = 5  # counted; one more goes first as a warm-up
    output: str = "outputs/benchmarks/decode_cpu.json"


def ways_to_decode(options: BenchmarkOptions, target: Target, requests: list[Request]) -> dict[str, Way]:
    draft = load_draft(options.checkpoint, target=target)
    longest = max(len(request.prompt_ids) for request in requests)
    positions = longest + options.max_new_tokens + draft.block_size

    def engine(slots: int, *, with_draft: bool) -> Callable[[], Run]:
        proposer = DSparkProposer(draft, target) if with_draft else None
        engine = SpeculativeEngine(
            target,
            proposer,
            slots=slots,
            max_length=positions,
            policy=ConfidenceThreshold(options.confidence_threshold, draft.block_size) if with_draft else None,
            verification=options.verification,
        )

        def run() -> Run:
            started = time.perf_counter()
            made = engine.generate(requests)
            seconds = time.perf_counter() - started
            rounds = [r for completion in made for r in completion.rounds]
            tokens = sum(len(completion.output_ids) for completion in made)
            return Run(tokens, seconds, len(rounds), sum(r.emitted for r in rounds), engine.timing)

        return run

    return {
        GENERATE: Way(lambda: generate(options, target, requests)),
        "plain, batch 1": Way(engine(1, with_draft=False), GENERATE),
        "speculative, batch 1": Way(engine(1, with_draft=True), "plain, batch 1"),
        "plain, batch 8": Way(engine(8, with_draft=False), "plain, batch 1"),
        "speculative, batch 8": Way(engine(8, with_draft=True), "plain, batch 8"),
    }


def generate(options: BenchmarkOptions, target: Target, requests: list[Request]) -> Run:
    """One prompt after the other through Transformers."""
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    made = 0
    started = time.perf_counter()
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        mask = torch.ones_like(prompt)
        output = target.model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=list(request.stop_token_ids) or None,
            pad_token_id=0,
            **sampling,
        )
        made += output.shape[1] - prompt.shape[1]
    return Run(made, time.perf_counter() - started)


def measure(ways: dict[str, Way], repeats: int) -> dict[str, list[Run]]:
    """Each way's counted runs; one more goes first."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            run = way.run()
            if repeat:
                runs[name].append(run)
    return runs


def result_of(way: Way, runs: list[Run], others: list[Run] | None) -> dict[str, Any]:
    """Speeds of one way, ratios to another one run by run, and the parts of a round in milliseconds."""
    result: dict[str, Any] = {"tokens_per_second": summary([run.tokens / run.seconds for run in runs])}
    if others:
        pairs = zip(runs, others, strict=True)
        ratios = [a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in pairs]
        result["ratio"] = {"to": way.against, **summary(ratios)}
    timings = [run.timing for run in runs if run.timing]
    if timings:
        result["tau"] = sum(run.emitted for run in runs) / sum(run.rounds for run in runs)
        result["round_ms"] = {
            part: statistics.median(1e3 * getattr(timing, part) / timing.rounds for timing in timings)
            for part in ("draft", "verify")
        }
        result["prefill_share"] = statistics.median(run.timing.prefill / run.seconds for run in runs if run.timing)
    return result


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for column in ("decoded with", "tokens/s", "compared with", "ratio", "tau", "draft + verify, ms"):
        table.add_column(column, no_wrap=True)
    for name, result in results.items():
        ratio, parts = result.get("ratio"), result.get("round_ms")
        table.add_row(
            name,
            spread(result["tokens_per_second"], 0),
            ratio["to"] if ratio else "",
            spread(ratio, 2) if ratio else "",
            f"{result['tau']:.2f}" if parts else "",
            f"{parts['draft']:.1f} + {parts['verify']:.1f}" if parts else "",
        )
    return table


def main(options: BenchmarkOptions) -> None:
    transformers_logging.set_verbosity_error()
    target = load_target(options.target)
    tokenizer = load_tokenizer(options.target)
    stops = stop_tokens(options.target, None, tokenizer)
    names = options.sets.split(",")
    prompts = [p for name in names for p in load_set(name, options.prompts_dir, tokenizer, limit=options.prompts)]
    requests = [
        Request(prompt.ids, options.max_new_tokens, options.temperature, seed=index, stop_token_ids=stops)
        for index, prompt in enumerate(prompts)
    ]
    ways = ways_to_decode(options, target, requests)
    runs = measure(ways, options.repeats)
    results = {
        name: result_of(way, runs[name], runs[way.against] if way.against else None) for name, way in ways.items()
    }
    Console(width=max(Console().width, TABLE_WIDTH)).print(table_of(results))
    write_record(options.output, results, options, requests=len(requests))


if __name__ == "__main__":
    run_command(main, BenchmarkOptions)
