"""speculators loads a draft and computes its logits, or makes a draft with random weights.

Two of its functions are replaced: the one that draws anchors at random, by the anchors of the request, and the one that
makes losses of logits, by one that keeps the logits.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from driving import answer
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models.dflash import core as blocks


def logits(path: str, tensors: str, result: str) -> dict[str, Any]:
    """Tensors in: input_ids, hidden_states, verifier_last_hidden_states, and anchors of a block draft, one document.
    Out: logits of every slot of a block draft, or of every step of a chain."""
    given = load_file(tensors)
    config = SpeculatorModelConfig.from_pretrained(path)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(path, config=config).float().eval()
    kept = keep_what_losses_see(type(model).__module__)
    anchors = given.pop("anchors")
    blocks.select_anchors = lambda *_: (anchors, torch.ones_like(anchors, dtype=torch.bool))
    tokens = given["input_ids"].shape[1]
    options = {"max_anchors": len(anchors)} if hasattr(model, "block_size") else {"ttt_steps": 7}
    with torch.no_grad():
        model(
            **given,
            loss_mask=torch.ones(1, tokens, dtype=torch.bool),
            document_ids=torch.zeros(1, tokens, dtype=torch.long),
            **options,
        )
    save_file(kept, result)
    return {"version": version("speculators"), "class": type(model).__name__}


def keep_what_losses_see(module: str) -> dict[str, torch.Tensor]:
    """Logits, one entry a step, and a block draft's confidence logits."""
    kept: dict[str, torch.Tensor] = {}

    def keep(logits: torch.Tensor, targets: torch.Tensor, third: torch.Tensor | None, *_: Any, **__: Any) -> tuple:
        kept[f"logits{len(kept)}"] = logits.contiguous()
        if third is not None and third.is_floating_point():
            kept["confidence"] = third.contiguous()
        return torch.zeros(()), {}

    importlib.import_module(module).compute_metrics = keep
    return kept


def random(kind: str, target: str, arguments: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """A draft of speculators' own class, no weight of which is zero or one, saved by it."""
    from speculators.train.cli import create_transformer_layer_config

    model_class = SpeculatorModel.registry[kind]
    layers = create_transformer_layer_config(target, **arguments.pop("decoder"))
    torch.manual_seed(0)
    model = model_class.from_training_args(layers, verifier_name_or_path=target, draft_attn_impl="eager", **arguments)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn_like(weight)
                weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else noise / weight.shape[-1] ** 0.5)
    model.save_pretrained(output_dir)
    return {"files": sorted(path.name for path in Path(output_dir).iterdir())}


def do(what: str, **request: Any) -> dict[str, Any]:
    return {"logits": logits, "random": random}[what](**request)


if __name__ == "__main__":
    answer(do)
