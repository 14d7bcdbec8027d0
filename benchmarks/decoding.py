"""Tokens per second of a target, decoded in several ways, interleaved in one run.

    python -m benchmarks.decoding checkpoint=outputs/demo/smoke [sps=SPS.json] [repeats=5] [max_new_tokens=96]

Each repeat decodes the same prompts in every way, one after the other, so a slow spell of the machine hits all of them;
ratios are taken within a repeat. At batch 1 each prompt set is also decoded alone, since a mix counts most what takes
most rounds. Printed and written as JSON: median, smallest and largest tokens/s and ratios, tokens per round (tau), how
long the parts of a round take, and what the sequential head adds to a round of the largest batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks import growing_cache
from benchmarks.head_cost import head_share
from benchmarks.summary import spread, summary, write_record
from deepspec import load_draft
from deepspec.arguments import run_command
from deepspec.config import ConfigError
from deepspec.decoding import LookupProposer, Proposer, Request, SpeculativeEngine, Timing, proposer_of
from deepspec.decoding.calibration import load_calibration
from deepspec.decoding.policies import ConfidenceThreshold, PolicySetup, build_policy
from deepspec.decoding.sps import load_table
from deepspec.drafts import DSparkModel
from deepspec.drafts.loading import find_draft_folder
from deepspec.evaluation.plan import stop_tokens
from deepspec.evaluation.sets import load_set
from deepspec.targets import Target, load_target, load_tokenizer

TABLE_WIDTH = 150
GENERATE, LOOKUP = "transformers generate", "transformers prompt lookup"
GROWING = "one prompt, growing cache"


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
    """A way of decoding, and the names of the ways that it is compared with."""

    run: Callable[[], Run]
    against: Sequence[str] = ()


@dataclass
class BenchmarkOptions:
    """Plain and speculative decoding at several batch sizes against Transformers and a one-prompt loop."""

    checkpoint: str = "???"  # draft folder or run folder
    target: str = "builtin"
    dtype: str = "auto"  # of both: auto (the target's own), float32, bfloat16, float16
    prompts_dir: str = "outputs/corpus/prompts"
    sets: str = "math,code,chat"
    prompts: int = 11  # per set
    max_new_tokens: int = 96  # per prompt; answers end earlier at their stop token
    temperature: float = 1.0
    batches: str = "1,8,16,32"
    verification: str = "token"  # token or block
    sps: str | None = None  # table of this machine, for the asynchronous scheduler; null = leave that out
    repeats: int = 5  # counted; one more goes first as a warm-up
    output: str = "outputs/benchmarks/decoding.json"


def ways_to_decode(
    options: BenchmarkOptions, target: Target, draft: DSparkModel, sets: dict[str, list[Request]]
) -> dict[str, Way]:
    requests = [request for of_set in sets.values() for request in of_set]
    setup = scheduler_setup(options, draft, target.device)
    ways = {
        GENERATE: Way(lambda: generate(options, target, requests)),
        LOOKUP: Way(lambda: generate(options, target, requests, prompt_lookup_num_tokens=draft.draft_length)),
        GROWING: Way(lambda: one_by_one(target, draft, requests)),
    }
    for size in sizes_of(options):
        ways |= with_the_engine(options, target, draft, setup, requests, size, against=[GENERATE, GROWING])
        lookup = LookupProposer(draft.draft_length)
        found = ConfidenceThreshold(0.5, draft.draft_length)
        run = engine(options, target, lookup, requests, size, policy=found)
        ways[f"prompt lookup, batch {size}"] = Way(run, [f"plain, batch {size}", LOOKUP])
    for name, of_set in sets.items():
        ways |= with_the_engine(options, target, draft, setup, of_set, 1, of=f", {name}")
    return ways


def with_the_engine(
    options: BenchmarkOptions,
    target: Target,
    draft: DSparkModel,
    setup: PolicySetup | None,
    requests: list[Request],
    size: int,
    of: str = "",
    against: Sequence[str] = (),
) -> dict[str, Way]:
    """Plain decoding, whole blocks of the draft and, where there is a table for it, the scheduler."""
    plain = f"plain, batch {size}{of}"
    ways = {
        plain: Way(engine(options, target, None, requests, size), against),
        f"speculative, batch {size}{of}": Way(
            engine(options, target, proposer_of(draft, target), requests, size), [plain, *against]
        ),
    }
    if setup:
        policy = build_policy("asynchronous", replace(setup, rows=size))
        run = engine(options, target, proposer_of(draft, target), requests, size, policy=policy)
        ways[f"asynchronous scheduler, batch {size}{of}"] = Way(run, [plain, *against])
    return ways


def sizes_of(options: BenchmarkOptions) -> list[int]:
    return [int(size) for size in options.batches.split(",")]


def scheduler_setup(options: BenchmarkOptions, draft: DSparkModel, device: torch.device) -> PolicySetup | None:
    """For one row; None = no table was given."""
    if options.sps is None:
        return None
    temperatures = load_calibration(find_draft_folder(options.checkpoint), draft.draft_length)
    has_confidences, table = draft.confidence_head is not None, load_table(options.sps)
    return PolicySetup(draft.draft_length, 1, has_confidences, device, sps=table, temperatures=temperatures)


def engine(
    options: BenchmarkOptions,
    target: Target,
    proposer: Proposer | None,
    requests: list[Request],
    slots: int,
    **more: Any,
) -> Callable[[], Run]:
    longest = max(len(request.prompt_ids) for request in requests)
    positions = longest + options.max_new_tokens + (proposer.block_size if proposer else 0)
    made = SpeculativeEngine(
        target, proposer, slots=slots, max_length=positions, verification=options.verification, **more
    )

    def run() -> Run:
        started = time.perf_counter()
        completions = made.generate(requests)
        seconds = time.perf_counter() - started
        rounds = [r for completion in completions for r in completion.rounds]
        tokens = sum(len(completion.output_ids) for completion in completions)
        return Run(tokens, seconds, len(rounds), sum(r.emitted for r in rounds), made.timing)

    return run


def one_by_one(target: Target, draft: DSparkModel, requests: list[Request]) -> Run:
    started = time.perf_counter()
    made = [growing_cache.decode(target, draft, request) for request in requests]
    seconds = time.perf_counter() - started
    tokens = sum(len(output) for output, _ in made)
    rounds = sum(rounds for _, rounds in made)
    return Run(tokens, seconds, rounds, tokens - len(made))


def generate(options: BenchmarkOptions, target: Target, requests: list[Request], **more: Any) -> Run:
    """One prompt after the other through Transformers."""
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    made = 0
    started = time.perf_counter()
    for request in requests:
        prompt = torch.tensor([request.prompt_ids], device=target.device)
        mask = torch.ones_like(prompt)
        output = target.model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=list(request.stop_token_ids) or None,
            pad_token_id=0,
            **sampling,
            **more,
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


def result_of(runs: list[Run], others: dict[str, list[Run]]) -> dict[str, Any]:
    """Speeds of one way, ratios to others run by run, and the parts of a round in milliseconds."""
    result: dict[str, Any] = {
        "tokens_per_second": summary([run.tokens / run.seconds for run in runs]),
        "ratios": {
            name: summary([a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in zip(runs, theirs, strict=True)])
            for name, theirs in others.items()
        },
    }
    if runs[0].rounds:
        result["tau"] = sum(run.emitted for run in runs) / sum(run.rounds for run in runs)
    timings = [run.timing for run in runs if run.timing]
    if timings:
        result["round_ms"] = {
            part: summary([1e3 * getattr(timing, part) / timing.rounds for timing in timings])
            for part in ("draft", "verify")
        }
        result["prefill_share"] = summary([run.timing.prefill / run.seconds for run in runs if run.timing])
    return result


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for column in ("decoded with", "tokens/s", "compared with", "ratio", "tau", "draft + verify, ms"):
        table.add_column(column, no_wrap=True)
    for name, result in results.items():
        parts = result.get("round_ms")
        ratios = result["ratios"].items()
        table.add_row(
            name,
            spread(result["tokens_per_second"], 0),
            "\n".join(other for other, _ in ratios),
            "\n".join(spread(ratio, 2) for _, ratio in ratios),
            f"{result['tau']:.2f}" if "tau" in result else "",
            f"{parts['draft']['median']:.1f} + {parts['verify']['median']:.1f}" if parts else "",
        )
    return table


def main(options: BenchmarkOptions) -> None:
    transformers_logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = load_target(options.target, dtype=options.dtype, device=device)
    tokenizer = load_tokenizer(options.target)
    stops = stop_tokens(options.target, None, tokenizer)
    draft, seeds = load_draft(options.checkpoint, dtype=target.dtype, device=device, target=target), count()
    if not isinstance(draft, DSparkModel):
        raise ConfigError(f"checkpoint={options.checkpoint}: this benchmark is for DSpark and DFlash")
    sets = {
        name: [
            Request(prompt.ids, options.max_new_tokens, options.temperature, seed=next(seeds), stop_token_ids=stops)
            for prompt in load_set(name, options.prompts_dir, tokenizer, limit=options.prompts)
        ]
        for name in options.sets.split(",")
    }
    ways = ways_to_decode(options, target, draft, sets)
    runs = measure(ways, options.repeats)
    results = {name: result_of(runs[name], {o: runs[o] for o in way.against}) for name, way in ways.items()}
    Console(width=max(Console().width, TABLE_WIDTH)).print(table_of(results))
    share, largest = None, max(sizes_of(options))
    if draft.markov_head is not None:
        share = head_share(
            target, draft, [request for of_set in sets.values() for request in of_set], largest, options.repeats
        )
        percent = spread({name: 100 * value for name, value in share.items()}, 1)
        print(f"the sequential and the confidence head add {percent}% to a round of batch {largest}")
    requests = {name: len(of_set) for name, of_set in sets.items()}
    write_record(options.output, results, options, requests=requests, head_share=share)


if __name__ == "__main__":
    run_command(main, BenchmarkOptions)
