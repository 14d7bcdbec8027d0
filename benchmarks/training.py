"""Tokens/s and peak memory of a training step: ours packed, ours padded, and as papers write it down, interleaved.

    python -m benchmarks.training [model=builtin|wide|qwen3_4b] [repeats=3] [steps=3]

Every measurement runs in a fresh process on the same documents, whose lengths are long-tailed; those of one repeat
follow one another, so a slow spell of the machine hits all of them, and ratios are taken within a repeat. A step is
what train.py does: features of the resident target, forward, backward, AdamW. Memory is the peak while stepping above
what one tiny step, which loads every library, had needed. `qwen3_4b` has random weights and needs a large GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.objective_step import memory_in_use
from benchmarks.processes import in_fresh_process
from benchmarks.random_models import random_draft, random_target
from benchmarks.straightforward import PaddedFeatures, plain_kernels, with_every_slot
from benchmarks.summary import spread, summary, write_record
from deepspec.arguments import run_command
from deepspec.config import ConfigError, LossConfig
from deepspec.data.packing import Sample, TokenBatch
from deepspec.data.sampler import BatchSplit
from deepspec.features import OnlineFeatures
from deepspec.targets import Target, TargetFeatures
from deepspec.training.batches import MicroBatch, MicroBatchMaker
from deepspec.training.flops import StepFlops, peak_flops
from deepspec.training.frozen import hold_target_weights_as_buffers
from deepspec.training.meter import PARTS, Meter, peak_memory
from deepspec.training.objective import DraftTrainingModule

PLAIN, PADDED, PACKED = "straightforward", "ours, padded", "ours, packed"
RESIDENT, GIVEN = FEATURES = ("resident", "given")
TABLE_WIDTH = 165


@dataclass(frozen=True)
class Shape:
    """A target and the draft that is trained for it."""

    target: dict[str, Any] | None  # of a random Qwen3; None = the built-in target
    draft_layers: int
    layer_ids: tuple[int, ...]
    anchors: int
    max_length: int
    median_length: int
    documents: int  # per step
    padded_rows: int  # documents of a padded micro-batch
    tokens_per_batch: int  # of a packed one
    rank: int = 64


SHAPES = {
    "builtin": Shape(None, 2, (1, 3, 4), 64, 1024, 120, 16, 8, 1024),
    "wide": Shape(
        {
            "vocab_size": 32_000,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
        },
        *(2, (1, 3, 5), 64, 1024, 120, 16, 8, 1024),
    ),
    "qwen3_4b": Shape(
        {
            "vocab_size": 151_936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        *(5, (1, 9, 17, 25, 33), 512, 4096, 600, 16, 2, 8192, 256),
    ),
}


@dataclass
class TrainingOptions:
    """Compare training steps; one row a way."""

    model: str = "builtin"  # builtin, wide or qwen3_4b
    repeats: int = 3  # processes per way
    steps: int = 3  # counted, after one more
    plain: bool = True  # also the straightforward step
    features: str = "resident"  # resident: the target computes them; given: they are random numbers
    seed: int = 0
    output: str = "outputs/benchmarks/training.json"
    measure: str = ""  # set by the benchmark for its own processes


def documents(shape: Shape, vocabulary: int, seed: int, step: int) -> list[Sample]:
    """Long-tailed lengths (log-normal, sigma 1); the first quarter of each is the prompt."""
    rng = np.random.default_rng((seed, step))
    lengths = np.clip(rng.lognormal(np.log(shape.median_length), 1.0, shape.documents), 16, shape.max_length).astype(
        int
    )
    return [
        Sample(index, step, str(index), rng.integers(0, vocabulary, n).tolist(), [0] * (n // 4) + [1] * (n - n // 4))
        for index, n in enumerate(lengths.tolist())
    ]


def micro_batches(way: str, shape: Shape, samples: list[Sample], block_size: int) -> list[MicroBatch]:
    lengths = np.array([len(sample.input_ids) for sample in samples])
    budget = shape.tokens_per_batch if way == PACKED else None
    split = BatchSplit(len(samples), 1, min(shape.padded_rows, len(samples)), budget, lengths)
    make = MicroBatchMaker(0, way == PACKED, shape.anchors, block_size, decay=4.0, seed=0)
    groups = split([(sample.index, 0) for sample in samples])[0]
    batches = [make([samples[index] for index, _ in group]) for group in groups]
    return [with_every_slot(batch, block_size) for batch in batches] if way == PLAIN else batches


def build(shape: Shape, device: torch.device) -> tuple[Target, DraftTrainingModule]:
    """The target in bfloat16 and the draft in float32 on a GPU; both in float32 on a CPU."""
    target = random_target(shape.target, device)
    draft = random_draft(target, shape.draft_layers, shape.layer_ids, shape.rank, shape.anchors)
    hold_target_weights_as_buffers(draft, target.dtype)
    return target, DraftTrainingModule(draft.train(), LossConfig()).to(device)


class GivenFeatures:
    """Random features, made on the device: a step without the target's part."""

    flops_per_token = 0.0

    def __init__(self, target: Target, layer_ids: Sequence[int]):
        self.device, self.dtype = target.device, target.dtype
        self.widths = (target.hidden_size * len(layer_ids), target.hidden_size)

    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        shape = batch.input_ids.shape
        return TargetFeatures(*(torch.randn(*shape, w, dtype=self.dtype, device=self.device) for w in self.widths))


Source = OnlineFeatures | PaddedFeatures | GivenFeatures


def measure(way: str, options: TrainingOptions) -> dict[str, float]:
    """This process's tokens/s, peak memory in bytes and loss."""
    shape = SHAPES[options.model]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, module = build(shape, device)
    block_size = module.draft.draft_length
    features: Source = (PaddedFeatures if way == PLAIN else OnlineFeatures)(target, shape.layer_ids)
    if options.features == GIVEN:
        features = GivenFeatures(target, shape.layer_ids)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    steps = [
        micro_batches(way, shape, documents(shape, target.vocab_size - 1, options.seed, step), block_size)
        for step in range(options.steps + 1)
    ]
    online = OnlineFeatures(target, shape.layer_ids)
    target_flops = 0.0 if options.features == GIVEN else online.flops_per_token
    flops = StepFlops(module.draft, target_flops, needs_target_logits=True)
    meter = Meter(device, flops, peak_flops(device))
    tiny = [Sample(0, 0, "tiny", list(range(16)), [0] * 8 + [1] * 8)]
    losses = []
    with plain_kernels() if way == PLAIN else nullcontext():
        train_step(module, optimizer, features, micro_batches(way, shape, tiny, block_size), meter)
        before, held = held_memory(device), memory_in_use(device)
        for number, batches in enumerate(steps):
            if number == 1:
                meter.read()  # what compiles or fills caches is not counted
            with meter.step() as count:
                losses.append(train_step(module, optimizer, features, batches, meter))
                count.tokens = sum(batch.tokens.tokens for batch in batches)
                count.anchors = sum(batch.num_blocks for batch in batches)
                count.slots = sum(int((batch.blocks["weights"] > 0).sum()) for batch in batches)
    figures = meter.read()
    return figures | {
        "memory": peak_memory(device) - before,
        "held_memory": held,  # weights and the optimizer's state
        "loss": statistics.fmean(losses),
    }


def held_memory(device: torch.device) -> int:
    """Bytes; what an earlier peak left behind in the process counts, so that only a new peak is seen."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return peak_memory(device)


def train_step(
    module: DraftTrainingModule,
    optimizer: torch.optim.Optimizer,
    source: Source,
    batches: list[MicroBatch],
    meter: Meter,
) -> float:
    """As `Trainer` steps, without accelerate."""
    device = next(module.parameters()).device
    divisor = sum(batch.divisor for batch in batches)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    loss = torch.zeros((), device=device)
    for batch in batches:
        with meter.part("features"):
            features = source.batch_features(batch.tokens)
        with meter.part("forward"), autocast:
            sums = module(
                **batch.to(device),
                context_features=features.context,
                final_features=features.final,
                with_metrics=False,
            )
        with meter.part("backward"):
            (sums["loss"] / divisor).backward()
        loss += sums["loss"].detach() / divisor
    with meter.part("optimizer"):
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def compare(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Figures of every way, and ratios to the first one run by run."""
    results: dict[str, dict[str, Any]] = {}
    base = next(iter(runs.values()))
    for way, measured in runs.items():
        pairs = list(zip(measured, base, strict=True))
        names = ("tokens_per_second", "memory", "loss")
        results[way] = {name: summary([run[name] for run in measured]) for name in names}
        results[way]["speed_ratio"] = summary([a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs])
        results[way]["memory_ratio"] = summary([a["memory"] / b["memory"] for a, b in pairs])
        for name in measured[0].keys() - {"tokens_per_second", "memory", "loss"}:
            results[way][name] = statistics.median(run[name] for run in measured)
    return results


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for column in ("step", "tokens/s", "ratio", "memory, MiB", "ratio", "features / forward / backward / optimizer"):
        table.add_column(column, no_wrap=True)
    for way, result in results.items():
        parts = [result[f"{part}_seconds"] / result["step_seconds"] for part in PARTS if part != "wait"]
        table.add_row(
            way,
            spread(result["tokens_per_second"], 0),
            spread(result["speed_ratio"], 2),
            f"{result['memory']['median'] / 2**20:,.0f}",
            spread(result["memory_ratio"], 2),
            " / ".join(f"{part:.0%}" for part in parts),
        )
    return table


def main(options: TrainingOptions) -> None:
    if options.model not in SHAPES:
        raise ConfigError(f"model={options.model}: must be one of {', '.join(SHAPES)}")
    if options.features not in FEATURES:
        raise ConfigError(f"features={options.features}: must be one of {', '.join(FEATURES)}")
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    ways = [PLAIN, PADDED, PACKED] if options.plain else [PADDED, PACKED]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            runs[way].append(in_fresh_process("benchmarks.training", asdict(options) | {"measure": way}))
    results = compare(runs)
    Console(width=max(Console().width, TABLE_WIDTH)).print(table_of(results))
    write_record(options.output, results, options, shape=asdict(SHAPES[options.model]))


if __name__ == "__main__":
    run_command(main, TrainingOptions)
