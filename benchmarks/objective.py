"""Peak memory and time of the losses over the vocabulary: all logits in memory, chunked, fused (on a GPU).

    python -m benchmarks.objective [vocab=4096,32768,151936] [anchors=64,512] [repeats=3]

Each measurement is a process of its own (`benchmarks.objective_step`). Each repeat measures all ways one after the
other, so a slow spell of the machine hits all of them; ratios are taken within a repeat. The last line of each size has
only every other slot supervised. Printed and written as JSON: median, smallest and largest peak, time and ratios.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.processes import OutOfMemory, in_fresh_process
from benchmarks.summary import spread, summary, write_record
from deepspec.arguments import run_command

NAIVE = "naive"
HALF = ", half of the slots supervised"
TABLE_WIDTH = 140


@dataclass
class BenchmarkOptions:
    """Peak memory and time of one forward and backward pass over [anchors * block_size, vocab] logits."""

    vocab: str = "4096,32768,151936"
    anchors: str = "64,512"
    block_size: int = 7
    hidden: int = 0  # 0 = 256 on a CPU, 2560 on a GPU
    rank: int = 0  # 0 = 64 on a CPU, 256 on a GPU
    dtype: str = ""  # of states and head; empty = float32 on a CPU, bfloat16 on a GPU
    device: str = ""  # empty = cuda where there is one
    steps: int = 2  # of each process, after one that is not counted; the fastest counts
    repeats: int = 3
    output: str = "outputs/benchmarks/objective.json"


@dataclass
class Measured:
    """The repeats of one way at one size; both lists are empty where memory ran out."""

    peak_mib: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    out_of_memory: bool = False


def ways(device: str) -> dict[str, dict[str, Any]]:
    """Name of each way and its options of `objective_step`."""
    named: dict[str, dict[str, Any]] = {
        NAIVE: {"implementation": "reference"},
        "chunked": {"implementation": "chunked"},
    }
    if device == "cuda":
        named["fused"] = {"implementation": "triton"}
    best = list(named)[-1]
    return named | {best + HALF: named[best] | {"supervised_every": 2}}


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process finds; raises RuntimeError when it fails, and not for lack of memory."""
    try:
        return in_fresh_process("benchmarks.objective_step", options)
    except OutOfMemory:
        return {"out_of_memory": True}


def measure_size(common: dict[str, Any], device: str, repeats: int, title: str) -> dict[str, Measured]:
    """All ways in turn, again and again; one that runs out of memory is not tried again."""
    found = {name: Measured() for name in ways(device)}
    turns = [turn for _ in range(repeats) for turn in ways(device).items()]
    for name, options in track(turns, title, console=Console(stderr=True), transient=True):
        measured = found[name]
        if measured.out_of_memory:
            continue
        result = measure(common | options)
        if "out_of_memory" in result:
            found[name] = Measured(out_of_memory=True)
            continue
        measured.peak_mib.append(result["peak_bytes"] / 2**20)
        measured.seconds.append(min(result["seconds"]))
    return found


def results_of(found: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Figures of each way, and its ratios to the naive one repeat by repeat."""
    results: dict[str, dict[str, Any]] = {}
    naive = found[NAIVE]
    for name, measured in found.items():
        if measured.out_of_memory:
            results[name] = {"out_of_memory": True}
            continue
        results[name] = {"peak_mib": summary(measured.peak_mib), "seconds": summary(measured.seconds)}
        if name != NAIVE and not naive.out_of_memory:
            for figure in ("peak_mib", "seconds"):
                pairs = zip(getattr(measured, figure), getattr(naive, figure), strict=True)
                results[name][f"{figure}_to_naive"] = summary([ours / theirs for ours, theirs in pairs])
    return results


def table_of(sizes: list[dict[str, Any]]) -> Table:
    table = Table()
    for column in ("vocabulary", "anchors", "losses", "peak, MiB", "of naive", "ms", "of naive"):
        table.add_column(column, no_wrap=True)
    for size in sizes:
        for name, result in size["ways"].items():
            row = [f"{size['vocab']:,}", str(size["anchors"]), name]
            if "out_of_memory" in result:
                table.add_row(*row, "out of memory")
                continue
            milliseconds = {key: 1e3 * value for key, value in result["seconds"].items()}
            peak, seconds = (result.get(f"{figure}_to_naive") for figure in ("peak_mib", "seconds"))
            table.add_row(
                *row,
                f"{result['peak_mib']['median']:,.0f}",
                spread(peak, 3) if peak else "",
                f"{milliseconds['median']:,.0f}",
                spread(seconds, 2) if seconds else "",
            )
        table.add_section()
    return table


def main(options: BenchmarkOptions) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    common = {
        "hidden": options.hidden or (2560 if on_gpu else 256),
        "rank": options.rank or (256 if on_gpu else 64),
        "dtype": options.dtype or ("bfloat16" if on_gpu else "float32"),
        "device": device,
        "steps": options.steps,
    }
    sizes = []
    for vocab in map(int, options.vocab.split(",")):
        for anchors in map(int, options.anchors.split(",")):
            size = common | {"vocab": vocab, "slots": anchors * options.block_size}
            found = measure_size(size, device, options.repeats, f"{vocab} tokens, {anchors} anchors")
            sizes.append({**size, "anchors": anchors, "ways": results_of(found)})
    Console(width=max(Console().width, TABLE_WIDTH)).print(table_of(sizes))
    write_record(options.output, sizes, options)


if __name__ == "__main__":
    run_command(main, BenchmarkOptions)
