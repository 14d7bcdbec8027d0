"""Measure SPS(B) on this machine: `python -m deepspec.decoding.profile checkpoint=FOLDER [key=value ...]`.

For a ladder of B: a pass of the target over B new tokens, as the engine verifies them, behind a context of given length
in the cache, logits included. And for a ladder of rows: what drafting for them takes. On a GPU both run through CUDA
graphs, as in the engine. Everything is repeated in turn, so that whatever slows the machine for a while touches all
sizes; the file holds every sample, medians and quartiles, and the smoothed values that a scheduler uses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from deepspec.arguments import run_command
from deepspec.config import CHOICES, ConfigError, near_match
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.graphs import Graphs, Tensors, cache_columns
from deepspec.decoding.passes import target_pass
from deepspec.decoding.proposers import Proposer
from deepspec.decoding.proposing import proposer_of
from deepspec.decoding.requests import Request
from deepspec.decoding.sampling import SamplingSettings
from deepspec.decoding.span import Span
from deepspec.decoding.sps import SPS_FILE, smooth, smoothing_report
from deepspec.drafts import load_draft
from deepspec.drafts.loading import find_draft_folder, read_draft_config
from deepspec.environment import command_line, machine, versions
from deepspec.files import write_atomically
from deepspec.targets import Target, dtype_name, load_target, position_range

DTYPES = CHOICES["target.dtype"]
WARM_UP = 3  # runs of every size that are not counted
Run = Callable[[], object]


@dataclass
class ProfileOptions:
    """Measure passes per second of a draft's target, by tokens in a pass, and the time of drafting, by rows."""

    checkpoint: str = "???"  # draft folder, run folder (its newest checkpoint) or Hub id
    target: str | None = None  # null = the one that the draft was trained for
    revision: str | None = None  # of the target
    gguf_file: str | None = None  # of the target
    dtype: str = "auto"  # of both: auto (the target's own), float32, bfloat16, float16
    device: str | None = None  # null = cuda where there is one, else cpu
    tokens: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    )  # B
    rows: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])  # for the time of drafting
    tokens_per_row: int | None = None  # at most, in a pass of the target; null = the block and its anchor
    context: int = 256  # tokens before them in the cache
    repeats: int = 20
    output: str | None = None  # null = sps.json in the draft's folder


def layout(tokens: int, tokens_per_row: int) -> tuple[int, int]:
    """Rows and tokens of each that make a pass of so many tokens, with the fewest rows that divide it evenly."""
    rows = next(rows for rows in range(-(-tokens // tokens_per_row), tokens + 1) if tokens % rows == 0)
    return rows, tokens // rows


@torch.inference_mode()
def verifying(
    target: Target, proposer: Proposer, cache: SlotCache, rows: int, tokens: int, context: int, graphs: Graphs | None
) -> Run:
    """A pass of the target over `tokens` new tokens in each of the first `rows` slots, behind `context` tokens.

    Logits are computed, and the proposer takes in the features, as in every round.
    """
    ids = torch.randint(target.vocab_size, (rows * tokens,), device=target.device)
    starts = torch.full((rows,), context, device=target.device)
    end = cache_columns(context + tokens) if graphs else context + tokens

    def verified(ids: Tensor, starts: Tensor) -> Tensors:
        span = Span(range(rows), starts, tokens, total=rows * tokens, longest=tokens, end=end)
        if rows == 1 and graphs is None:
            span.start = context
        is_certain = tokens == 1 and graphs is None
        return (target.logits(target_pass(target, proposer, cache, span, ids, is_certain=is_certain)),)

    return _through(graphs, ("verify", rows, tokens), verified, (ids, starts))


@torch.inference_mode()
def drafting(proposer: Proposer, target: Target, rows: int, context: int, graphs: Graphs | None) -> Run:
    """Proposals for the first `rows` slots at temperature 1."""
    device = target.device
    anchors, positions = torch.zeros(rows, dtype=torch.long, device=device), torch.full((rows,), context, device=device)
    requests = [Request([0], 1, temperature=1.0)] * rows
    settings = SamplingSettings.of_requests(requests, target.vocab_size, device)
    uniform = torch.rand(rows, proposer.block_size, dtype=torch.float64, device=device)
    columns = cache_columns(context + proposer.block_size + 1) if graphs else context

    def drafted(anchors: Tensor, positions: Tensor, uniform: Tensor) -> Tensors:
        made = proposer.propose(anchors, positions, columns, settings, uniform, proposer.block_size)
        return made.tokens, made.probabilities, made.confidences

    return _through(graphs, ("draft", rows), drafted, (anchors, positions, uniform))


def _through(graphs: Graphs | None, key: Hashable, function: Callable[..., Tensors], inputs: Tensors) -> Run:
    """A run of the function, through a graph where the engine would use one."""
    if graphs is None:
        return lambda: function(*inputs)
    return lambda: graphs.run(key, function, inputs)


@torch.inference_mode()
def measure(runs: dict[int, Run], repeats: int, device: torch.device) -> dict[int, list[float]]:
    """Seconds of each run, `repeats` times, all runs in turn."""
    samples: dict[int, list[float]] = {size: [] for size in runs}
    for repeat in track(range(-WARM_UP, repeats), description="measuring", transient=True):
        for size, run in runs.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if repeat >= 0:
                samples[size].append(time.perf_counter() - started)
    return samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(options: ProfileOptions) -> dict[str, Any]:
    """Measure, and return what the file holds.

    Raises:
        ConfigError, FileNotFoundError, ValueError: sizes that cannot be measured, no such draft or target.
    """
    _check(options)
    folder = find_draft_folder(options.checkpoint)
    config = read_draft_config(folder)
    path, revision, gguf_file = options.target, options.revision, options.gguf_file
    if path is None:
        path = getattr(config, "target_model_name_or_path", None)
        revision = revision or getattr(config, "target_revision", None)
        gguf_file = gguf_file or getattr(config, "target_gguf_file", None)
    if path is None:
        raise ConfigError(f"{folder} does not say what target it was trained for; give target=FOLDER")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(path, revision=revision, gguf_file=gguf_file, dtype=options.dtype, device=device)
    proposer = proposer_of(load_draft(folder, dtype=target.dtype, device=device, target=target), target)
    tokens_per_row = options.tokens_per_row or proposer.block_size + 1
    layouts = {tokens: layout(tokens, tokens_per_row) for tokens in sorted(set(options.tokens))}
    slots, columns = max([rows for rows, _ in layouts.values()] + options.rows), options.context + tokens_per_row
    if columns > position_range(target.config):
        raise ConfigError(
            f"context={options.context}: with {tokens_per_row} tokens after it, more than the "
            f"{position_range(target.config)} positions of target {path}"
        )
    graphs = Graphs(target.device) if target.device.type == "cuda" else None  # as the engine has them
    if graphs:
        columns = cache_columns(columns)
    proposer.allocate(slots, columns)
    cache = SlotCache(target, slots, columns, tokens_per_row)
    behind = options.context
    passes = {B: verifying(target, proposer, cache, *shape, behind, graphs) for B, shape in layouts.items()}
    of_passes = measure(passes, options.repeats, target.device)
    drafts = {rows: drafting(proposer, target, rows, behind, graphs) for rows in sorted(set(options.rows))}
    of_drafts = measure(drafts, options.repeats, target.device)
    return {
        "source": "measured",
        "target": {"path": path, "dtype": dtype_name(target.dtype), "fingerprint": target.fingerprint},
        "settings": asdict(options) | {"device": device, "tokens_per_row": tokens_per_row},
        **curves(of_passes, of_drafts, {tokens: rows for tokens, (rows, _) in layouts.items()}),
        "machine": machine(),
        "versions": versions(),
        "command": command_line(),
    }


def curves(
    of_passes: Mapping[int, Sequence[float]], of_drafts: Mapping[int, Sequence[float]], rows: Mapping[int, int]
) -> dict[str, Any]:
    """`points`, `rows` and `smoothing` of a table from samples in seconds.

    Args:
        of_passes: by tokens in the pass.
        of_drafts: by rows.
        rows: in which the tokens of a pass were.
    """
    smoothed, pass_smoothing = _smoothed(of_passes)
    beside, draft_smoothing = _smoothed(of_drafts)
    points = [
        {"tokens": tokens, "rows": rows[tokens], "steps_per_second": 1 / seconds, **_spread(of_passes[tokens])}
        for tokens, seconds in smoothed.items()
    ]
    return {
        "points": points,
        "rows": [{"rows": n, "draft_seconds": seconds, **_spread(of_drafts[n])} for n, seconds in beside.items()],
        "smoothing": {"points": pass_smoothing, "rows": draft_smoothing},
    }


def _smoothed(samples: Mapping[int, Sequence[float]]) -> tuple[dict[int, float], dict[str, Any]]:
    medians = [float(np.median(values)) for values in samples.values()]
    after = smooth(medians)
    return dict(zip(samples, after.tolist(), strict=True)), smoothing_report(medians, after)


def _spread(samples: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return {"median_seconds": median, "quartiles": [low, high], "samples": list(samples)}


def _check(options: ProfileOptions) -> None:
    for key, values in (("tokens", options.tokens), ("rows", options.rows)):
        if not values or min(values) < 1:
            raise ConfigError(f"{key}={values}: give sizes of at least 1")
    for key, value, least in (("context", options.context, 1), ("repeats", options.repeats, 1)):
        if value < least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
    if options.dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise ConfigError(f"dtype={options.dtype}: must be one of {allowed}.{near_match(options.dtype, DTYPES)}")


def print_curves(record: Mapping[str, Any], console: Console) -> None:
    columns = ("tokens", "rows", "median ms", "quartiles ms", "passes/s", "tokens/s")
    table = Table(*columns, title="Target, by tokens in a pass")
    for point in record["points"]:
        low, high = point["quartiles"]
        table.add_row(
            str(point["tokens"]),
            str(point["rows"]),
            f"{1000 * point['median_seconds']:.2f}",
            f"{1000 * low:.2f} to {1000 * high:.2f}",
            f"{point['steps_per_second']:.1f}",
            f"{point['tokens'] * point['steps_per_second']:.0f}",
        )
    console.print(table)
    table = Table("rows", "median ms", "quartiles ms", title="Drafting, by rows")
    for point in record["rows"]:
        low, high = point["quartiles"]
        median = f"{1000 * point['median_seconds']:.2f}"
        table.add_row(str(point["rows"]), median, f"{1000 * low:.2f} to {1000 * high:.2f}")
    console.print(table)
    smoothing = record["smoothing"]["points"]
    console.print(
        f"Smoothing to times that never fall with size changed {smoothing['changed_points']} of {smoothing['points']} "
        f"points, by {smoothing['largest_change']:.1%} at most and {smoothing['mean_change']:.1%} on average."
    )


def main(options: ProfileOptions) -> None:
    record = profile(options)
    console = Console()
    print_curves(record, console)
    output = Path(options.output) if options.output else find_draft_folder(options.checkpoint) / SPS_FILE
    write_atomically(output, json.dumps(record, indent=1) + "\n")
    console.print(f"written to {output}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, ProfileOptions)
