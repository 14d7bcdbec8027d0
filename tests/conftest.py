"""Fixtures shared by all tests: reference numbers, tiny targets and tiny drafts."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma4TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from deepspec.data.packing import Sample, TokenBatch, lay_out
from deepspec.drafts import DSparkModel, build_draft, build_draft_config, load_draft
from deepspec.targets import Target, load_target
from deepspec.training.anchors import supervise

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN_DRAFTS = ("dspark_vanilla", "dspark_gated", "dspark_rnn", "dflash")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def processes():
    """Starts processes quickly: a clean server imports everything once and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspec.training.loop", "data_prep.cache", "training_world", "cache_world"])
    return context


@dataclass(frozen=True)
class Golden:
    """One draft of the reference implementation and what it computes."""

    name: str
    draft: DSparkModel
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    record: dict[str, Any]  # the JSON: losses, metrics, decoding traces


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder with the reference's target, drafts and numbers."""
    return GOLDENS


@pytest.fixture(scope="session")
def golden_target() -> Target:
    return load_target(str(GOLDENS / "target"))


def load_golden(name: str) -> Golden:
    return Golden(
        name,
        load_draft(GOLDENS / f"ckpt_{name}"),
        load_file(GOLDENS / "inputs.safetensors"),
        load_file(GOLDENS / f"{name}.safetensors"),
        json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8")),
    )


def positions_of(golden: Golden) -> Tensor:
    """The golden rows are one document each."""
    return torch.arange(golden.inputs["input_ids"].shape[1]).expand_as(golden.inputs["input_ids"])


@pytest.fixture(params=GOLDEN_DRAFTS)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Every draft of the reference in turn."""
    return load_golden(request.param)


def tiny_target_config(family: str = "qwen3", **changes: Any) -> PreTrainedConfig:
    """A target config small enough for any test: V 61, d 32, 6 layers, 4 heads over 2 key/value heads."""
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gemma4":
        settings |= {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        settings |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 61, "final_logit_softcapping": 3.0}
    classes = {"qwen3": Qwen3Config, "llama": LlamaConfig, "gemma4": Gemma4TextConfig}
    return classes[family](**(settings | changes))


def tiny_draft_config(target_config: PreTrainedConfig | None = None, **changes: Any) -> PreTrainedConfig:
    """A valid draft config for `tiny_target_config()`; `changes` are arguments of `build_draft_config`."""
    settings: dict[str, Any] = {
        "algorithm": "dspark",
        "num_layers": 2,
        "block_size": 5,
        "target_layer_ids": [0, 2, 4],
        "mask_token_id": 60,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "confidence_head": True,
        "confidence_head_with_markov": True,
        "num_anchors": 4,
    }
    return build_draft_config(target_config or tiny_target_config(), **(settings | changes))


def old_llama_config(target_changes: dict[str, Any], **changes: Any) -> PreTrainedConfig:
    """That of a draft from before every draft was Qwen3-shaped: its Llama target's with the draft's fields."""
    fields = tiny_draft_config(tiny_target_config("llama"), **changes).to_dict() | target_changes
    fields |= {"model_type": "llama", "architectures": ["LlamaDSparkModel"]}
    return LlamaConfig.from_dict(fields)


@pytest.fixture
def tiny_draft() -> Callable[..., DSparkModel]:
    """`tiny_draft(family="qwen3", **changes)`: a draft in which no weight is zero or one, so that nothing hides.

    The draft is of the family itself: Qwen3DSparkModel, Gemma4DSparkModel, or the old LlamaDSparkModel.
    """

    def make(family: str = "qwen3", target_changes: dict[str, Any] | None = None, **changes: Any) -> DSparkModel:
        if family == "llama":
            config = old_llama_config(target_changes or {}, **changes)
        else:
            architecture = {"qwen3": "Qwen3DSparkModel", "gemma4": "Gemma4DSparkModel"}[family]
            target_config = tiny_target_config(family, **(target_changes or {}))
            config = tiny_draft_config(target_config, **({"architecture": architecture} | changes))
        draft = build_draft(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in draft.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
        return draft

    return make


@dataclass(frozen=True)
class TinyBatch:
    """Random training inputs for `tiny_draft`: documents of 24, 24 and 15 tokens, one a row."""

    input_ids: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    context_features: Tensor
    final_features: Tensor
    anchor_columns: Tensor
    block_mask: Tensor

    def rows(self, chosen: list[int]) -> TinyBatch:
        return TinyBatch(**{name: value[chosen] for name, value in vars(self).items()})

    def packed(self, order: tuple[int, ...] = (2, 0, 1)) -> TinyBatch:
        """The same documents and blocks in a single row, without padding."""
        lengths = [(24, 24, 15)[row] for row in order]
        starts = [sum(lengths[:place]) for place in range(len(order))]
        tokens = {
            name: torch.cat([value[row, :length] for row, length in zip(order, lengths, strict=True)])[None]
            for name, value in vars(self).items()
            if name not in ("anchor_columns", "block_mask")
        }
        columns = [self.anchor_columns[row][self.block_mask[row]] for row in order]
        anchors = torch.cat([start + column for start, column in zip(starts, columns, strict=True)])[None]
        return TinyBatch(**tokens, anchor_columns=anchors, block_mask=torch.ones_like(anchors, dtype=torch.bool))

    def for_backbone(self) -> dict[str, Tensor]:
        """Arguments of `DSparkModel.forward`."""
        names = ("input_ids", "position_ids", "context_features", "anchor_columns", "block_mask")
        return {name: getattr(self, name) for name in names}

    def for_objective(self, block_size: int, decay: float) -> dict[str, Tensor]:
        """Arguments of `DraftTrainingModule.forward`."""
        labels = supervise(
            self.input_ids, self.position_ids, self.loss_mask, self.anchor_columns, self.block_mask, block_size, decay
        )
        return self.for_backbone() | {"final_features": self.final_features, **vars(labels)}


@pytest.fixture
def tiny_batch() -> TinyBatch:
    generator = torch.Generator().manual_seed(2)
    loss_mask = torch.ones(3, 24, dtype=torch.bool)
    loss_mask[2, 15:] = False
    loss_mask[:, :3] = False
    loss_mask[0, 9:12] = False
    return TinyBatch(
        input_ids=torch.randint(0, 60, (3, 24), generator=generator),
        position_ids=torch.arange(24).expand(3, -1),
        loss_mask=loss_mask,
        context_features=torch.randn(3, 24, 96, generator=generator),
        final_features=torch.randn(3, 24, 32, generator=generator),
        anchor_columns=torch.tensor([[3, 7, 12, 20], [4, 5, 18, 22], [3, 11, 0, 0]]),
        block_mask=torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]]),
    )


def token_batch(input_ids: Tensor) -> TokenBatch:
    """Rows [rows, tokens] of one document each, every token supervised."""
    rows = [[Sample(i, 0, str(i), ids, [1] * len(ids))] for i, ids in enumerate(input_ids.tolist())]
    return lay_out(rows, pad_id=0)


@pytest.fixture(scope="session")
def training_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target, tokenizer and corpus to train on."""
    from training_world import build_world

    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def in_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Relative paths (outputs/, the cache of tokenized data) land where they are thrown away."""
    with contextlib.chdir(tmp_path_factory.getbasetemp()):
        yield
