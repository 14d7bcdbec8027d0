"""Rounds of the decoder at a model's real shape, with random weights: a line of JSON for each batch size.

    python -m benchmarks.gpu_decoding [model=qwen3_4b] [context=1024] [batches=[1,8,32]]

All rows are behind a context of the same length and stay to the end, a round verifies whole blocks. `wall_ms` is what
a step of the engine takes; `draft_ms` and `verify_ms` are what its graphs take by the GPU's clock when they run again
by themselves; `host_ms` is the rest: book-keeping, and whatever else runs outside graphs. A floor is the time that
reading the weights and the cached keys and values once would take at the bandwidth of a copy measured here.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from benchmarks.device_clock import copy_bandwidth, device_seconds
from benchmarks.gpu_kernels import kernels_of
from benchmarks.random_models import random_draft, random_target
from benchmarks.training import SHAPES
from deepspec.arguments import run_command
from deepspec.config import ConfigError
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.drafts import DSparkModel
from deepspec.drafts.backbone import DraftLayer
from deepspec.targets import Target

WARM_UP = 3  # rounds; the first captures
COLUMNS = 256  # caches are a multiple of it long, so that no graph reads an odd number


@dataclass
class DecodingOptions:
    """Time of a round and of its parts, of prefill and plain steps, and memory."""

    model: str = "qwen3_4b"  # a shape of benchmarks.training
    context: int = 1024  # tokens of every row before its first round
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])
    rounds: int = 12  # counted
    kernels: bool = False  # also which kernels a draft and a verify graph consist of
    heads: bool = False  # also rounds of the draft without its sequential and confidence head


class Workbench:
    """A target and a draft with random weights, and what their rounds take."""

    def __init__(self, options: DecodingOptions):
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = SHAPES[options.model]
        self.target = random_target(shape.target, self.device)
        self.target_bytes = held(self.device)
        self.draft = random_draft(self.target, shape.draft_layers, shape.layer_ids, shape.rank)
        nn.Module.to(self.draft, dtype=self.target.dtype)
        self.draft_bytes = held(self.device) - self.target_bytes
        headless = copy.copy(self.draft)
        headless._modules = self.draft._modules | {"markov_head": None, "confidence_head": None}
        self.headless = headless
        self.bandwidth = copy_bandwidth(self.device, 2**32 if self.device.type == "cuda" else 2**24)

    @torch.inference_mode()
    def measure(self, batch: int) -> dict[str, Any]:
        """Figures of one batch size; `out_of_memory` where there is not enough."""
        try:
            return self._measure(batch)
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).split(". ")[0]}
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, batch: int) -> dict[str, Any]:
        plain = self._rounds(batch, None)
        speculative = self._rounds(batch, self.draft, with_kernels=self.options.kernels)
        floors = {
            "draft": draft_bytes(self.draft, batch, self.options.context) / self.bandwidth,
            "verify": verify_bytes(self.target, batch, self.options.context) / self.bandwidth,
        }
        figures = {
            **speculative,
            **{f"{part}_floor_ms": 1e3 * floor for part, floor in floors.items()},
            **{f"{part}_of_floor": 1e3 * floor / speculative[f"{part}_ms"] for part, floor in floors.items()},
            "plain": plain,
            "plain_of_floor": 1e3 * floors["verify"] / plain["verify_ms"],
            "bandwidth": self.bandwidth,
            "target_bytes": self.target_bytes,
            "draft_bytes": self.draft_bytes,
        }
        if self.options.heads:
            headless = self._rounds(batch, self.headless)
            figures["headless"] = headless
            figures["head_share"] = speculative["wall_ms"] / headless["wall_ms"] - 1
        return figures

    def _rounds(self, batch: int, draft: DSparkModel | None, with_kernels: bool = False) -> dict[str, Any]:
        """Prefill and rounds of `batch` rows; without a draft plain steps."""
        options, before = self.options, held(self.device)
        new_tokens = (WARM_UP + options.rounds + 2) * ((draft.draft_length if draft else 0) + 1)
        columns = -(-(options.context + new_tokens + 8) // COLUMNS) * COLUMNS
        proposer = DSparkProposer(draft, self.target, allow_other_target=True) if draft else None
        engine = SpeculativeEngine(self.target, proposer, slots=batch, max_length=columns, graphs=True)
        caches = held(self.device) - before
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        generator = torch.Generator().manual_seed(batch)
        for row in range(batch):
            prompt = torch.randint(self.target.vocab_size, (options.context,), generator=generator).tolist()
            engine.submit(Request(prompt, new_tokens, temperature=1.0, seed=row))
        passes = []
        while engine.waiting:
            passes.append(timed(engine.step))
        prefill_peak = peak(self.device) - before
        for _ in range(WARM_UP):
            engine.step()
        walls = [1e3 * timed(engine.step) for _ in range(options.rounds)]
        assert engine.active == batch, "all rows stay to the end"
        graphs = {str(cast(tuple, key)[0]): run for key, run in engine.graphs.reruns().items()} if engine.graphs else {}
        parts = {name: 1e3 * device_seconds(run, self.device) for name, run in graphs.items()}
        wall = statistics.median(walls)
        figures: dict[str, Any] = {
            "wall_ms": wall,
            "wall_range_ms": [min(walls), max(walls)],
            **{f"{name}_ms": milliseconds for name, milliseconds in parts.items()},
            "host_ms": wall - sum(parts.values()),
            "prefill_passes": len(passes),
            "prefill_seconds": sum(passes),
            "prefill_tokens_per_second": batch * options.context / sum(passes),
            "last_prefill_pass_seconds": passes[-1],
            "memory": {
                "caches": caches,
                "prefill_peak": prefill_peak,
                "graphs": held(self.device) - before - caches,
                "peak": peak(self.device) - before,
            },
        }
        if with_kernels:
            figures["kernels"] = {name: kernels_of(run) for name, run in graphs.items()}
        return figures


def timed(run: Callable[[], object]) -> float:
    """Seconds of something that ends synchronised with the device."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def verify_bytes(target: Target, batch: int, context: int) -> int:
    """What a pass must read: layers, head, and the keys and values of all rows."""
    weights = [*target.decoder_layers.parameters(), target.head_weight]
    cached = sum(shape.bytes for shape in target.memory.key_values.values())
    return sum(weight.nbytes for weight in weights) + batch * context * cached


def draft_bytes(draft: DSparkModel, batch: int, context: int) -> int:
    """What drafting a block must read: layers, head, the table of the sequential head once for each token, and the
    cached keys and values of all rows."""
    weights = sum(weight.nbytes for weight in [*draft.layers.parameters(), draft.lm_head.weight])
    if draft.markov_head is not None:
        weights += draft.draft_length * draft.markov_head.markov_w2.weight.nbytes
    attention = cast(DraftLayer, draft.layers[0]).self_attn
    cached = 2 * len(draft.layers) * attention.kv_heads * attention.head_dim * draft.lm_head.weight.itemsize
    return weights + batch * context * cached


def held(device: torch.device) -> int:
    """Bytes of the device's allocator in use."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main(options: DecodingOptions) -> None:
    if options.model not in SHAPES:
        raise ConfigError(f"model={options.model}: must be one of {', '.join(SHAPES)}")
    bench = Workbench(options)
    for batch in options.batches:
        print(json.dumps({"batch": batch, "context": options.context, **bench.measure(batch)}), flush=True)


if __name__ == "__main__":
    run_command(main, DecodingOptions)
