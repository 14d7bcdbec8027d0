"""Where serving engines fall short of a draft, whatever layout it is saved in. Read from vLLM 0.32, SGLang 0.5.23,
speculators 0.9 and Transformers 5.24."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from deepspec.config import ConfigError
from deepspec.drafts.configuration import (
    ARCHITECTURES,
    DFLASH,
    GEMMA4,
    DraftSettings,
    architecture_of,
    uniform_layers,
)
from deepspec.drafts.eagle3_configuration import EAGLE3, LLAMA_EAGLE3, QWEN3_EAGLE3
from deepspec.drafts.families import FAMILIES

LLAMA = ARCHITECTURES["llama"]


@dataclass(frozen=True)
class DraftKind(DraftSettings):
    """What decides which engine can use a draft."""

    architecture: str
    vocab_size: int  # of the target
    shares_keys_and_values: bool  # Gemma 4's attention_k_eq_v

    @classmethod
    def of(cls, config: PreTrainedConfig) -> DraftKind:
        """Raises ConfigError: see `DraftSettings.of`."""
        return cls(
            **vars(DraftSettings.of(config)),
            architecture=architecture_of(config),
            vocab_size=config.vocab_size,
            shares_keys_and_values=bool(getattr(config, "attention_k_eq_v", False)),
        )

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> DraftKind:
        """Raises ConfigError: see `config_of_fields`."""
        return cls.of(config_of_fields(fields))

    @property
    def is_fill_in(self) -> bool:
        """A DFlash as engines have it: the first slot predicts nothing."""
        return self.architecture == DFLASH

    @property
    def is_pruned(self) -> bool:
        return self.draft_vocab_size is not None

    @property
    def head_rows(self) -> int:
        return self.draft_vocab_size or self.vocab_size


def config_of_fields(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a config.json in DeepSpec's own layout.

    Raises:
        ConfigError: it is not the config of a draft, or of one that DeepSpec does not have.
    """
    family = FAMILIES.get(str(fields.get("model_type")))
    if family is None:
        raise ConfigError(f"model_type={fields.get('model_type')}: a draft's is one of {', '.join(FAMILIES)}")
    try:
        config = uniform_layers(family.config_class.from_dict(dict(fields)))
        DraftKind.of(config)
        return config
    except (StrictDataclassError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"a field is missing or wrong ({type(error).__name__}: {reason})") from error


def vllm_limits(kind: DraftKind) -> list[str]:
    """What vLLM cannot do, a clause each."""
    if kind.architecture == GEMMA4:
        limits = []
        if not kind.shares_keys_and_values:
            limits.append(f"has {GEMMA4} only with attention_k_eq_v")
        if kind.logit_softcap is not None and kind.markov_rank:
            limits.append("caps the bias of the sequential head too, not the head's logits alone")
        if kind.is_pruned:
            limits.append(f"has {GEMMA4} only with the whole vocabulary")
    else:
        limits = _unscaled(kind)
    if kind.algorithm == "dflash" and not kind.is_fill_in:
        limits.append("has DFlash only in the slot convention where the first slot predicts nothing")
    elif kind.algorithm == "dspark" and kind.markov_rank == 0:
        limits.append("has no DSpark without a sequential head (markov_rank=0)")
    elif kind.algorithm == "dspark" and kind.markov_head_type != "vanilla":
        limits.append(f"has only the vanilla sequential head (markov_head_type={kind.markov_head_type})")
    return limits


def sglang_limits(kind: DraftKind) -> list[str]:
    """What SGLang cannot do, a clause each."""
    if kind.algorithm == EAGLE3:
        if kind.architecture == QWEN3_EAGLE3:
            return [f"has no query and key norms in an Eagle3 (draft.architecture={LLAMA_EAGLE3} has none)"]
        return _unscaled(kind)
    if kind.architecture == GEMMA4:
        return [f"has no {GEMMA4}"]
    limits = _unscaled(kind)
    if kind.is_fill_in:  # it proposes the most probable tokens, whatever the scale or cap
        limits = [limit for limit in limits if "logit" not in limit]
    elif kind.logit_scale != 1:
        limits.append(f"does not scale its logits (logit_scale={kind.logit_scale:g})")
    if kind.markov_rank == 0 and not kind.is_fill_in:
        limits.append("refuses a draft without a sequential head (markov_rank=0)")
    if kind.is_pruned:
        limits.append("drafts with the target's whole head, so it has no pruned vocabulary")
    if -1 in kind.target_layer_ids:
        limits.append("cannot capture the embedding's output (target_layer_ids has -1)")
    return limits


def speculators_limits(kind: DraftKind) -> list[str]:
    """What speculators cannot do, a clause each."""
    if kind.architecture == GEMMA4:
        return ["has Qwen3 layers only"]
    limits = _unscaled(kind)
    if kind.logit_scale != 1:
        limits.append(f"does not scale its logits (logit_scale={kind.logit_scale:g})")
    return limits


def transformers_limits(kind: DraftKind) -> list[str]:
    """What Transformers' own assisted generation cannot do, a clause each."""
    limits = []
    if not kind.is_fill_in:
        limits.append("decodes with DFlash drafts only, in the slot convention where the first slot predicts nothing")
    if kind.is_pruned:
        limits.append("drafts with the target's whole head, so it has no pruned vocabulary")
    return limits


def _unscaled(kind: DraftKind) -> list[str]:
    limits = []
    if kind.embedding_scale != 1:
        limits.append(f"does not scale its embedding (embedding_scale={kind.embedding_scale:g})")
    if kind.logit_softcap is not None:
        limits.append(f"does not cap its logits (final_logit_softcapping={kind.logit_softcap:g})")
    return limits


LIMITS: dict[str, Callable[[DraftKind], list[str]]] = {
    "vllm": vllm_limits,
    "sglang": sglang_limits,
    "speculators": speculators_limits,
    "transformers": transformers_limits,
}
ENGINE_TITLES = {"vllm": "vLLM", "sglang": "SGLang", "speculators": "speculators", "transformers": "Transformers"}


def limits_of(engine: str, kind: DraftKind) -> list[str]:
    """What of such a draft an engine (a key of `LIMITS`) cannot do, a clause each; empty if it can serve it."""
    if kind.architecture == LLAMA:
        return [f"has no {LLAMA}"]
    return LIMITS[engine](kind)


def engine_limits(config: PreTrainedConfig) -> list[str]:
    """What the two engines that people serve with cannot do with such a draft, a line each; empty if both do all."""
    kind = DraftKind.of(config)
    by_limit: dict[str, list[str]] = {}
    for engine in ("vllm", "sglang"):
        for limit in limits_of(engine, kind):
            by_limit.setdefault(limit, []).append(ENGINE_TITLES[engine])
    return [f"{', '.join(engines)}: {limit}" for limit, engines in by_limit.items()]
