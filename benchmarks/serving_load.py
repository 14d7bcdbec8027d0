"""Speculative decoding under load: mixed prompts arrive at an engine, under several policies, interleaved in one run.

    python -m benchmarks.serving_load checkpoint=outputs/demo/smoke
    python -m benchmarks.serving_load model=h200_qwen3_4b rounds=outputs/demo/eval_smoke

The first decodes with the engine on this machine. The second computes: rounds take what an SPS table says and accept
what an evaluation recorded (`benchmarks.load_model`), so that loads of a large GPU can be planned without one.

A closed loop of users comes first, then Poisson arrivals at shares of the most requests per second that plain decoding
answered there. At each load all policies take turns, each going on where it stopped, so that noise of the machine hits
all alike; one turn goes before those that count. Printed and written as JSON: throughput, tokens/s per user, verified
tokens, tau, latencies, and the schedulers' speed over that of the better fixed length; beside it two pictures like
figures 7 and 8 of the paper. A policy that answers less than arrives falls ever further behind: its latencies then tell
how long the run was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.load_engine import EngineLoad, measure_table
from benchmarks.load_model import Answer, ModelServer, read_answers
from benchmarks.load_plots import plot_budget, plot_throughput
from benchmarks.load_results import (
    ASYNCHRONOUS,
    CLOSED,
    FIXED_1,
    FIXED_BLOCK,
    PLAIN,
    POISSON,
    PREFIX,
    THRESHOLD,
    load_result,
    table_of,
    verdict_lines,
    verdicts,
)
from benchmarks.load_serving import Arrivals, ClosedLoop, Poisson, Server, Service, Slice, in_turn
from benchmarks.summary import write_record
from deepspec.arguments import run_command
from deepspec.config import ConfigError
from deepspec.decoding.calibration import load_calibration
from deepspec.decoding.policies import FixedLength, Policy, PolicySetup, build_policy
from deepspec.decoding.sps import load_table
from deepspec.drafts.loading import find_draft_folder

TABLE_WIDTH = 150
POLICIES = (PLAIN, FIXED_1, FIXED_BLOCK, THRESHOLD, PREFIX, ASYNCHRONOUS)
USERS, MODEL_USERS = [1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
Servers = Callable[[str, int], Server[Any]]  # of a policy, with so many slots


@dataclass
class LoadOptions:
    """Throughput, speed per user and verified tokens of verification policies under load, measured or computed."""

    checkpoint: str | None = None  # draft folder or run folder; with model= only for its calibration, if at all
    target: str = "builtin"
    model: str | None = None  # compute with this SPS table: a file or the name of a shipped one
    rounds: str | None = None  # and with what this output_dir of eval.py recorded
    sps: str | None = None  # what the schedulers of a real engine use; null = measure it first
    prompts_dir: str = "outputs/corpus/prompts"
    sets: str = "math,code,chat"
    prompts: int = 64  # of each set, over and over
    prompt_tokens: int = 0  # of a request, with model=; 0 = other machines read the prompts
    max_new_tokens: int = 48  # of a request; with model= as many as were recorded
    temperature: float = 1.0
    confidence_threshold: float = 0.5  # of the threshold policy
    users: list[int] = field(default_factory=list)  # of the closed loop; empty = 1 to 32, with model= 1 to 512
    offered: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.9])  # Poisson; empty = no such arrivals
    requests: int = 12  # that end in a turn; in a closed loop at least one for each user
    repeats: int = 4  # turns that count
    sps_repeats: int = 10
    seed: int = 0
    output: str | None = None  # null = outputs/benchmarks/serving_load.json, with model= serving_load_model.json


def policy_of(name: str, setup: PolicySetup, threshold: float) -> Policy:
    """
    Raises:
        ConfigError: the draft has no confidences.
    """
    if name == PLAIN:
        return FixedLength(0, setup.device)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        FIXED_1: ("fixed", {"draft_tokens": 1}),
        FIXED_BLOCK: ("fixed", {}),
        THRESHOLD: ("threshold", {"confidence_threshold": threshold}),
        PREFIX: ("prefix", {}),
        ASYNCHRONOUS: ("asynchronous", {}),
    }
    kind, changes = kinds[name]
    return build_policy(kind, replace(setup, **changes))


def at_load(
    servers: Servers,
    slots: int,
    arrivals: Callable[[], Arrivals],
    requests: Callable[[], Iterator[Any]],
    sizes: Sequence[int],
) -> dict[str, list[Slice]]:
    """What every policy does in its turns, which end with so many requests; the first turn is not counted."""
    services = {name: Service(servers(name, slots), arrivals(), requests()) for name in POLICIES}
    slices: dict[str, list[Slice]] = {name: [] for name in POLICIES}
    for turn, size in enumerate(sizes):
        for name, service in services.items():
            done = service.serve(size)
            if turn:
                slices[name].append(done)
    return slices


def sweep(options: LoadOptions, servers: Servers, requests: Callable[[], Iterator[Any]]) -> list[dict[str, Any]]:
    """All loads: the closed loop, then Poisson arrivals."""
    users, turns, results = users_of(options), options.repeats + 1, []
    for count in track(users, description="closed loop", transient=True):
        sizes = [max(options.requests, count)] * turns
        slices = at_load(servers, count, partial(ClosedLoop, count), requests, sizes)
        results.append(load_result(CLOSED, count, slices))
    slots, capacity = max(users), max(result["policies"][PLAIN]["requests_per_second"] for result in results)
    for share in track(options.offered, description="poisson", transient=True):
        sizes = [max(options.requests, slots)] + [options.requests] * options.repeats
        rate = share * capacity
        slices = at_load(servers, slots, partial(Poisson, rate, options.seed), requests, sizes)
        results.append(load_result(POISSON, rate, slices) | {"share": share})
    return results


def users_of(options: LoadOptions) -> list[int]:
    return sorted(options.users or (MODEL_USERS if options.model else USERS))


def computed(options: LoadOptions) -> tuple[Servers, Mapping[str, list[Answer]]]:
    """Servers that follow an SPS table, and the recorded answers that are asked for."""
    assert options.model is not None
    if options.rounds is None:
        raise ConfigError(
            "model= computes with recorded rounds; give rounds=FOLDER, the output_dir of a finished eval.py"
        )
    table = load_table(options.model, of_this_machine=False)
    answers = read_answers(options.rounds, options.temperature)
    block_size = next(iter(answers.values()))[0].confidences.shape[1]
    temperatures = load_calibration(find_draft_folder(options.checkpoint), block_size) if options.checkpoint else None

    def server(name: str, slots: int) -> Server[Answer]:
        setup = PolicySetup(block_size, slots, has_confidences=True, sps=table, temperatures=temperatures)
        policy = policy_of(name, setup, options.confidence_threshold)
        return ModelServer(table, policy, slots, prompt_tokens=options.prompt_tokens, seed=options.seed)

    return server, answers


def measured(options: LoadOptions, table_file: Path) -> tuple[Servers, Mapping[str, list[Any]]]:
    """Engines on this machine, and the requests that are sent to them."""
    if options.checkpoint is None:
        raise ConfigError("checkpoint= is missing: a draft folder or run folder; or compute with model= and rounds=")
    table = load_table(options.sps) if options.sps else None
    load = EngineLoad(
        options.checkpoint,
        options.target,
        prompts_dir=options.prompts_dir,
        sets=options.sets.split(","),
        prompts=options.prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
    )
    if table is None:
        users = max(users_of(options))
        measure_table(options.checkpoint, options.target, load.block_size, users, options.sps_repeats, table_file)
        table = load_table(table_file)
    temperatures = load_calibration(find_draft_folder(options.checkpoint), load.block_size)

    def server(name: str, slots: int) -> Server[Any]:
        setup = PolicySetup(
            load.block_size, slots, load.has_confidences, load.device, sps=table, temperatures=temperatures
        )
        policy = policy_of(name, setup, options.confidence_threshold)
        return load.server(slots, None if name == PLAIN else policy)

    return server, load.requests


def check(options: LoadOptions) -> None:
    for key, value, least in (
        ("requests", options.requests, 1),
        ("repeats", options.repeats, 1),
        ("sps_repeats", options.sps_repeats, 1),
        ("prompts", options.prompts, 1),
        ("prompt_tokens", options.prompt_tokens, 0),
        ("users", min(users_of(options)), 1),
    ):
        if value < least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
    if any(share <= 0 for share in options.offered):
        raise ConfigError(f"offered={options.offered}: shares of plain decoding's capacity, above 0")


def main(options: LoadOptions) -> None:
    check(options)
    name = "serving_load_model" if options.model else "serving_load"
    output = Path(options.output or f"outputs/benchmarks/{name}.json")
    table_file = output.with_name(f"{output.stem}_sps.json")
    servers, items = computed(options) if options.model else measured(options, table_file)
    results = sweep(options, servers, lambda: in_turn(items, options.seed))
    found = verdicts(results)
    console = Console(width=max(Console().width, TABLE_WIDTH))
    for kind in found:
        console.print(table_of(results, kind))
    for line in verdict_lines(found):
        console.print(line, soft_wrap=True)
    sps = options.model or options.sps or str(table_file)
    write_record(
        str(output), results, options, verdicts=found, sps=sps, items={key: len(of) for key, of in items.items()}
    )
    title = options.model or ("GPU" if torch.cuda.is_available() else "CPU")
    for plot, suffix in ((plot_throughput, "throughput"), (plot_budget, "budget")):
        picture = output.with_name(f"{output.stem}_{suffix}.png")
        plot(results, picture, title)
        print(f"written to {picture}")


if __name__ == "__main__":
    run_command(main, LoadOptions)
