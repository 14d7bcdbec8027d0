"""An SPS table computed from the roofline of a GPU, to plan loads without one: `python -m deepspec.decoding.roofline`.

A pass reads all weights once and computes for each of its tokens; what takes longer decides, on top of a floor of
launches and host work:

    pass(B)    = floor + max(weight bytes / bandwidth, B * FLOP per token / compute)
    context(R) = R * context * key and value bytes per token of the target / bandwidth
    draft(R)   = the same two of the draft for R * block_size tokens, and block_size readings of the sequential head

Bandwidth and compute are the data sheet's peaks times stated efficiencies. Nothing here was measured: the numbers of
a real GPU differ, the shape (flat while memory-bound, then linear) is what planning needs. Small matrices (norms, the
projection of captured features) and sampling are left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from deepspec.decoding.sps import SHIPPED
from deepspec.files import write_atomically

BF16_BYTES = 2
TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048, 4096)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Gpu:
    """An accelerator: peaks of its data sheet, and what share of them a decoder is taken to reach."""

    name: str
    bandwidth: float  # bytes per second
    compute: float  # FLOP per second, dense bf16
    bandwidth_efficiency: float
    compute_efficiency: float
    pass_floor: float  # seconds of launches and host work in a pass of the target
    draft_floor: float  # the same in a pass of the draft
    step_floor: float  # and in each step of the sequential head


@dataclass(frozen=True)
class Shape:
    """A decoder-only model with gated MLPs and grouped-query attention, and a DSpark draft of it, both in bf16."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    draft_vocab: int  # that the draft can propose
    draft_layers: int
    block_size: int
    markov_rank: int

    @property
    def layer_weights(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Of the layers and the head of the target."""
        return self.layers * self.layer_weights + self.hidden * self.vocab

    @property
    def draft_weights(self) -> int:
        """The same of the draft."""
        return self.draft_layers * self.layer_weights + self.hidden * self.draft_vocab


H200 = Gpu(
    name="H200-like",
    bandwidth=4.8e12,
    compute=989e12,
    bandwidth_efficiency=0.8,
    compute_efficiency=0.6,
    pass_floor=300e-6,
    draft_floor=60e-6,
    step_floor=15e-6,
)
QWEN3_4B = Shape(
    name="Qwen3-4B",
    hidden=2560,
    intermediate=9728,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=151936,
    draft_vocab=151936,
    draft_layers=5,
    block_size=7,
    markov_rank=256,
)


@dataclass(frozen=True)
class Roofline:
    """Times of one shape on one GPU behind a context of some tokens."""

    gpu: Gpu
    shape: Shape
    context: int

    def pass_seconds(self, tokens: int) -> float:
        """A pass of the target over so many tokens."""
        return self.gpu.pass_floor + self._matrices(tokens, self.shape.layers, self.shape.weights)

    def memory_bound_tokens(self) -> int:
        """The most tokens that a pass takes in without taking longer than with one."""
        fits = [tokens for tokens in range(1, TOKENS[-1] + 1) if self.pass_seconds(tokens) == self.pass_seconds(1)]
        return fits[-1]

    def draft_seconds(self, rows: int) -> float:
        """Drafting for so many rows."""
        shape = self.shape
        step = self.gpu.step_floor + self._slower(shape.markov_rank * shape.draft_vocab, rows)
        tokens = rows * shape.block_size
        backbone = self.gpu.draft_floor + self._matrices(tokens, shape.draft_layers, shape.draft_weights)
        return backbone + shape.block_size * step + self._context_seconds(rows, shape.draft_layers)

    def context_seconds(self, rows: int) -> float:
        """Reading the target's keys and values of so many rows."""
        return self._context_seconds(rows, self.shape.layers)

    def _context_seconds(self, rows: int, layers: int) -> float:
        per_token = 2 * layers * self.shape.kv_heads * self.shape.head_dim * BF16_BYTES
        return rows * self.context * per_token / self._bandwidth

    def _matrices(self, tokens: int, layers: int, weights: int) -> float:
        shape = self.shape
        attention = 2 * layers * shape.heads * shape.head_dim * self.context  # multiply-adds: scores and values
        return self._slower(weights, tokens, attention)

    def _slower(self, weights: int, tokens: int, further_multiply_adds: int = 0) -> float:
        """Seconds to read the weights or to compute with them for every token, whichever takes longer."""
        reading = weights * BF16_BYTES / self._bandwidth
        computing = 2 * tokens * (weights + further_multiply_adds) / (self.gpu.compute * self.gpu.compute_efficiency)
        return max(reading, computing)

    @property
    def _bandwidth(self) -> float:
        return self.gpu.bandwidth * self.gpu.bandwidth_efficiency


def roofline_record(gpu: Gpu = H200, shape: Shape = QWEN3_4B, context: int = 1024) -> dict[str, Any]:
    """The content of an SPS table's file, its derivation included."""
    roofline = Roofline(gpu, shape, context)
    knee = roofline.memory_bound_tokens()
    return {
        "source": "roofline, not measured",
        "derivation": {
            "pass": "pass_floor + max(weight bytes / bandwidth, tokens * FLOP per token / compute)",
            "context": "rows * context * key and value bytes per token / bandwidth",
            "draft": "pass and context of the draft's layers and the head for rows * block_size tokens + block_size "
            "steps of the sequential head",
            "gpu": asdict(gpu),
            "shape": asdict(shape),
            "context_tokens": context,
            "weights_per_layer": shape.layer_weights,
            "weight_bytes": BF16_BYTES * shape.weights,
            "memory_bound_tokens": knee,
        },
        "points": [{"tokens": n, "steps_per_second": 1 / roofline.pass_seconds(n)} for n in sorted({*TOKENS, knee})],
        "rows": [
            {"rows": n, "draft_seconds": roofline.draft_seconds(n), "context_seconds": roofline.context_seconds(n)}
            for n in ROWS
        ],
        "machine": {"accelerator": f"{gpu.name} roofline"},
    }


def main() -> None:
    file = SHIPPED / "h200_qwen3_4b.json"
    write_atomically(file, json.dumps(roofline_record(), indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
