"""Tiny drafts of every kind as folders, written without a model, and other people's folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

GOLDENS = Path(__file__).parent / "goldens"
TARGET = GOLDENS / "target"
KEPT_WORDS = [*range(0, 400, 2), 511]  # of the pruned vocabulary
METADATA: dict[str, Any] = {
    "target_revision": "abc123",
    "target_model_name_or_path": "me/target",
    "rendering": {"template_options": {"thinking": False}, "system_prompt": None},
}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    fields = {name: value for name, value in (read_config(folder) | changes).items() if name not in remove}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def change_tensors(folder: Path, **changes: Tensor | None) -> Path:
    """Replace tensors, or leave out those that are None; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


# Of which golden checkpoint another kind is made.
BASES = {
    "fill_in": "dflash",
    "pruned_fill_in": "dflash",
    "pruned": "dspark_vanilla",
    "windowed": "dspark_rnn",
    "llama_eagle3": "eagle3",
    "pruned_llama_eagle3": "eagle3",
}


def write_draft(kind: str, folder: Path) -> Path:
    """A draft in our layout: NAME of `ckpt_NAME`, or a kind of `BASES`; Eagle3 in bfloat16."""
    name = BASES.get(kind, kind)
    shutil.copytree(GOLDENS / f"ckpt_{name}", folder)
    algorithm = {"dflash": "dflash", "eagle3": "eagle3"}.get(name, "dspark")
    change_config(folder, **METADATA, draft_algorithm=algorithm)
    if algorithm == "eagle3":
        tensors = load_file(folder / "model.safetensors")
        halves = {tensor: weight.bfloat16() for tensor, weight in tensors.items()}
        save_file(halves, folder / "model.safetensors", {"format": "pt"})
        change_config(folder, dtype="bfloat16")
    else:
        change_config(folder, sample_from_anchor=True)
    if "llama" in kind:
        _as_llama(folder)
    if kind.endswith("fill_in"):
        nested = {"mask_token_id": 511, "target_layer_ids": [1, 3, 4], "causal": False}
        architecture = ["DFlashDraftModel"]
        change_config(folder, architectures=architecture, sample_from_anchor=False, block_size=8, dflash_config=nested)
    if kind == "windowed":
        sliding = ["sliding_attention"] * 2
        change_config(folder, layer_types=sliding, sliding_window=9, use_sliding_window=True, is_causal=False)
        change_config(folder, dflash_config={"causal": False})
    if kind.startswith("pruned"):
        _prune(folder)
    return folder


def _as_llama(folder: Path) -> None:
    """Without query and key norms, and with the config that a trained one has."""
    norms = {f"layers__0__self_attn__{name}_norm__weight": None for name in "qk"}
    change_tensors(folder, **norms)
    of_qwen3 = ("use_sliding_window", "sliding_window", "max_window_layers", "model_type")
    fields = {name: value for name, value in read_config(folder).items() if name not in of_qwen3}
    fields = LlamaConfig(**fields | {"architectures": ["LlamaEagle3Model"]}).to_diff_dict()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def _prune(folder: Path) -> None:
    words = torch.tensor(KEPT_WORDS)
    tensors = load_file(folder / "model.safetensors")
    mapping = {"d2t": words - torch.arange(len(words)), "t2d": torch.zeros(512, dtype=torch.bool)}
    mapping["t2d"][words] = True
    rows = ("lm_head.weight", "markov_head.markov_w2.weight")
    pruned = {name: tensors[name][words].clone() for name in rows if name in tensors}
    save_file(tensors | pruned | mapping, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, draft_vocab_size=len(words))


def write_zlab(folder: Path) -> Path:
    """As z-lab publishes: old names of RoPE's fields, most fields nested, no embedding, no head."""
    write_draft("fill_in", folder)
    change_tensors(folder, embed_tokens__weight=None, lm_head__weight=None)
    fields = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 8,
        "dflash_config": {"mask_token_id": 511, "target_layer_ids": [1, 3, 4]},
        "dtype": "float32",
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 2048,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": 6,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "vocab_size": 512,
    }
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def write_speculators_dspark(folder: Path) -> Path:
    """As `speculators` 0.9 saves a trained draft: a section of layers, and no embedding and head."""
    write_draft("dspark_gated", folder)
    change_tensors(folder, embed_tokens__weight=None, lm_head__weight=None)
    layers = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    layers += ("num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_parameters", "layer_types", "model_type")
    ours = read_config(folder)
    fields = {
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"": "config.DSparkSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [2, 4, 5],
        "block_size": 7,
        "confidence_head_with_markov": True,
        "draft_vocab_size": 512,
        "enable_confidence_head": True,
        "markov_head_type": "gated",
        "markov_rank": 16,
        "mask_token_id": 511,
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 7}],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": str(TARGET)},
        },
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "transformer_layer_config": {name: ours[name] for name in layers},
    }
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def write_llama_eagle3(folder: Path, mapping: torch.dtype = torch.int64) -> Path:
    """An EAGLE-3 draft as SpecForge saves it: three layers that it does not name, a pruned vocabulary, no embedding."""
    ours = read_config(write_draft("pruned_llama_eagle3", folder))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"fc.weight": tensors["fc.weight"][:, :192].clone(), "d2t": tensors["d2t"].to(mapping)}
    del tensors["embed_tokens.weight"]
    theirs = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    fields: dict[str, Any] = {name: ours[name] for name in (*sizes, "draft_vocab_size", "max_position_embeddings")} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": False,
        "hidden_act": "silu",
        "model_type": "llama",
        "num_hidden_layers": 1,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder
