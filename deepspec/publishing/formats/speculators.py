"""The layout of the package `speculators` (0.9), which vLLM reads: layers and verifier in sections of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

from deepspec.drafts.configuration import QWEN3
from deepspec.drafts.eagle3_configuration import EAGLE3_ARCHITECTURES
from deepspec.drafts.engines import DraftKind, speculators_limits
from deepspec.drafts.families import FAMILIES
from deepspec.publishing.errors import PublishError
from deepspec.publishing.formats.base import (
    NOT_KEPT,
    Config,
    DraftFolder,
    Format,
    Verifier,
    as_fill_in,
    complete,
    qwen3_limits,
    refuse_causal,
    with_window,
)
from deepspec.publishing.formats.eagle3 import COUNT, LAYERS, SWITCHES, our_eagle3, refuse_other_eagle3

VERSION = "0.9.0"
ARCHITECTURES = {"dspark": "DSparkSpeculator", "dflash": "DFlashSpeculator", "eagle3": "Eagle3Speculator"}
# Our field -> its field, where both mean the same.
BLOCK_FIELDS = {"block_size": "block_size", "mask_token_id": "mask_token_id"}
HEAD_FIELDS = {
    "markov_rank": "markov_rank",
    "markov_head_type": "markov_head_type",
    "enable_confidence_head": "enable_confidence_head",
    "confidence_head_with_markov": "confidence_head_with_markov",
}
# What a reader takes for a field that is not written; speculators' own defaults, which for the first are not vLLM's.
DSPARK_DEFAULTS: Config = {
    "sample_from_anchor": True,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
# By model_type.
LAYER_FIELDS = {
    name: frozenset(FAMILIES[name].config_class().to_diff_dict()) - set(NOT_KEPT)
    | {"is_causal", "dtype", "head_dim", "layer_types"}
    for name in EAGLE3_ARCHITECTURES
}
KEPT = "deepspec"  # its readers ignore it: what of our config it has no field for


class SpeculatorsFormat(Format):
    """Holds DSpark of all head types, DFlash of both slot conventions and Eagle3, of whole or pruned vocabularies."""

    name = "speculators"
    description = "the speculators package's: DSparkSpeculator, DFlashSpeculator, Eagle3Speculator"
    names_verifier = True
    needed = frozenset()

    def recognises(self, folder: DraftFolder) -> bool:
        return "speculators_model_type" in folder.config or "speculators_config" in folder.config

    def limits(self, kind: DraftKind) -> list[str]:
        return qwen3_limits(kind) or [f"is read by speculators, which {limit}" for limit in speculators_limits(kind)]

    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        assert verifier is not None, "names_verifier"
        kind = DraftKind.of_fields(config)
        fields = {
            "architectures": [ARCHITECTURES[kind.algorithm]],
            "speculators_model_type": kind.algorithm,
            "speculators_version": VERSION,
            "transformer_layer_config": _layer_section(config),
            "draft_vocab_size": kind.head_rows,
            "target_hidden_size": None,
            "speculators_config": {
                "algorithm": kind.algorithm,
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        "speculative_tokens": kind.draft_length,
                        "verifier_accept_k": 1,
                        "accept_tolerance": 0.0,
                    }
                ],
                "default_proposal_method": "greedy",
                "verifier": {"name_or_path": verifier.name, "architectures": verifier.architectures},
            },
            **(_eagle3_fields(kind) if kind.algorithm == "eagle3" else _block_fields(config, kind)),
        }
        back = self.from_config(fields)
        kept = {name: value for name, value in config.items() if name not in NOT_KEPT and back.get(name) != value}
        return fields | ({KEPT: kept} if kept else {})

    def from_config(self, config: Config) -> Config:
        kind = config.get("speculators_model_type")
        if kind not in ARCHITECTURES:
            raise PublishError(
                f"speculators_model_type={kind}: DeepSpec has {', '.join(ARCHITECTURES)}, and no other of speculators'"
            )
        section = config.get("transformer_layer_config")
        if not isinstance(section, Mapping):
            raise PublishError("config.json: transformer_layer_config is missing")
        fields = _our_eagle3(config, section) if kind == "eagle3" else _our_block(config, kind, section)
        if config.get("target_hidden_size") not in (None, fields["hidden_size"]):
            raise PublishError(
                f"target_hidden_size={config['target_hidden_size']}: DeepSpec has drafts of the target's hidden size "
                f"only, and this draft's is {fields['hidden_size']}"
            )
        if config.get("draft_vocab_size") not in (None, fields["vocab_size"]):
            fields["draft_vocab_size"] = config["draft_vocab_size"]
        verifier = (config.get("speculators_config") or {}).get("verifier") or {}
        fields["target_model_name_or_path"] = verifier.get("name_or_path")
        return fields | {"draft_algorithm": kind} | (config.get(KEPT) or {})


def _layer_section(config: Config) -> Config:
    model_type = config["model_type"]
    section = {name: value for name, value in config.items() if name in LAYER_FIELDS[model_type]}
    if model_type == "llama":  # where vLLM looks for it, or takes it for 3
        section[COUNT] = len(config["target_layer_ids"])
    return section | {"model_type": model_type}


def _block_fields(config: Config, kind: DraftKind) -> Config:
    """Of DSpark and DFlash. Every switch is written: readers differ in what they take for one that is not."""
    fields = {theirs: config[ours] for ours, theirs in BLOCK_FIELDS.items()}
    fields |= {
        "aux_hidden_state_layer_ids": [layer + 1 for layer in kind.target_layer_ids],
        "sample_from_anchor": kind.sample_from_anchor,
        "sliding_window_non_causal": True,
    }
    if kind.algorithm == "dspark":
        fields |= {
            "markov_rank": kind.markov_rank,
            "markov_head_type": kind.markov_head_type,
            "enable_confidence_head": kind.confidence_head,
            "confidence_head_with_markov": kind.confidence_head_with_markov,
        }
    return fields


def _eagle3_fields(kind: DraftKind) -> Config:
    return {
        LAYERS: [layer + 1 for layer in kind.target_layer_ids],
        **dict.fromkeys(SWITCHES, False),
        "embed_requires_grad": False,
    }


def _our_block(config: Config, kind: str, section: Mapping[str, Any]) -> Config:
    defaults = DSPARK_DEFAULTS if kind == "dspark" else {"sample_from_anchor": False}
    written = defaults | {name: value for name, value in config.items() if value is not None}
    needed = (*BLOCK_FIELDS.values(), "aux_hidden_state_layer_ids")
    if missing := [key for key in needed if key not in written]:
        raise PublishError(f"config.json: {', '.join(missing)} missing")
    fields = complete(_qwen3_section(section), "transformer_layer_config")
    refuse_causal(fields, is_causal=None if not written.get("sliding_window_non_causal") else False)
    fields |= {ours: written[theirs] for ours, theirs in BLOCK_FIELDS.items()}
    fields |= {
        "architectures": [QWEN3],
        "sample_from_anchor": written["sample_from_anchor"],
        "target_layer_ids": [layer - 1 for layer in written["aux_hidden_state_layer_ids"]],
        "markov_rank": 0,
        "enable_confidence_head": False,
    }
    if kind == "dflash":
        return with_window(as_fill_in(fields) if not written["sample_from_anchor"] else fields)
    if not written["sample_from_anchor"]:
        raise PublishError("sample_from_anchor=false in a DSpark draft: the first slot of DeepSpec's predicts a token")
    used = {ours: written[theirs] for ours, theirs in HEAD_FIELDS.items()}
    if not used["markov_rank"]:
        del used["markov_head_type"]
    if not used["enable_confidence_head"]:
        del used["confidence_head_with_markov"]
    return with_window(fields | used)


def _our_eagle3(config: Config, section: Mapping[str, Any]) -> Config:
    model_type = section.get("model_type")  # its readers differ in what they take for one that is not written
    if model_type not in EAGLE3_ARCHITECTURES:
        raise PublishError(
            f"transformer_layer_config.model_type={model_type}: DeepSpec has Eagle3 with layers of "
            f"{' and '.join(EAGLE3_ARCHITECTURES)}"
        )
    layers = config.get(LAYERS)
    methods = (config.get("speculators_config") or {}).get("proposal_methods")
    if not layers or not methods:
        raise PublishError(f"config.json: {LAYERS} or speculators_config.proposal_methods missing")
    given = {name: value for name, value in section.items() if name != COUNT}
    fields = complete(given, "transformer_layer_config", model_type) | {"ttt_length": methods[0]["speculative_tokens"]}
    refuse_other_eagle3(fields, config)
    return fields | our_eagle3(EAGLE3_ARCHITECTURES[model_type], [layer - 1 for layer in layers])


def _qwen3_section(section: Mapping[str, Any]) -> Config:
    """Layers of DSpark and DFlash are Qwen3's whatever the section's type; only fields that it leaves out differ."""
    if section.get("model_type", "qwen3") == "qwen3":
        return dict(section)
    if section["model_type"] != "llama":
        raise PublishError(
            f"transformer_layer_config.model_type={section['model_type']}: DeepSpec reads those of qwen3 and llama"
        )
    llama = LlamaConfig(**{name: value for name, value in section.items() if name not in NOT_KEPT}).to_diff_dict()
    return {name: value for name, value in llama.items() if name in LAYER_FIELDS["qwen3"]}
