"""Where serving engines fall short of a draft, whatever layout it is saved in. Read from vLLM 0.32, SGLang 0.5.23,
speculators 0.9 and Transformers 5.24."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

GEMMA4, LLAMA = "Gemma4DSparkModel", "LlamaDSparkModel"
FILL_IN = "DFlashDraftModel"
EAGLE3 = ("Qwen3Eagle3Model", "Eagle3DraftModel")


@dataclass(frozen=True)
class DraftKind:
    """What decides which engine can use a draft, from its config.json as a dictionary."""

    architecture: str
    algorithm: str  # dspark, dflash, eagle3
    sample_from_anchor: bool  # False: the first slot of a block predicts nothing
    draft_length: int  # tokens proposed a round
    target_layer_ids: tuple[int, ...]
    markov_rank: int
    markov_head_type: str
    confidence_head: bool
    confidence_with_markov: bool
    vocab_size: int  # of the target
    draft_vocab_size: int
    context_window: int | None
    embedding_scale: float
    logit_scale: float
    logit_softcap: float | None
    shares_keys_and_values: bool  # Gemma 4's attention_k_eq_v

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DraftKind:
        """Read the config of a draft in DeepSpec's own layout. Raises KeyError where a field is missing."""
        architecture = (config.get("architectures") or [""])[0]
        rank = config.get("markov_rank") or 0
        confidence = bool(config.get("enable_confidence_head"))
        guess = "eagle3" if architecture in EAGLE3 else "dspark" if rank or confidence else "dflash"
        algorithm = config.get("draft_algorithm") or guess
        from_anchor = bool(config.get("sample_from_anchor", architecture != FILL_IN))
        slots = config["ttt_length"] if algorithm == "eagle3" else config["block_size"]
        is_sliding = "sliding_attention" in (config.get("layer_types") or ())
        return cls(
            architecture=architecture,
            algorithm=algorithm,
            sample_from_anchor=from_anchor,
            draft_length=slots if from_anchor else slots - 1,
            target_layer_ids=tuple(config["target_layer_ids"]),
            markov_rank=rank,
            markov_head_type=config.get("markov_head_type") or "vanilla",
            confidence_head=confidence,
            confidence_with_markov=bool(rank and confidence and config.get("confidence_head_with_markov")),
            vocab_size=config["vocab_size"],
            draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
            context_window=config.get("sliding_window") if is_sliding else None,
            embedding_scale=config.get("embedding_scale") or 1.0,
            logit_scale=config.get("logit_scale") or 1.0,
            logit_softcap=config.get("final_logit_softcapping"),
            shares_keys_and_values=bool(config.get("attention_k_eq_v")),
        )

    @property
    def is_fill_in(self) -> bool:
        """A DFlash as engines have it: the first slot predicts nothing."""
        return self.algorithm == "dflash" and not self.sample_from_anchor

    @property
    def is_pruned(self) -> bool:
        return self.draft_vocab_size != self.vocab_size


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
    if kind.algorithm == "eagle3":
        return ["has Eagle3 with Llama layers only, and would leave out the norms over queries and keys without a word"]
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
    kind = DraftKind.of(config.to_dict())
    by_limit: dict[str, list[str]] = {}
    for engine in ("vllm", "sglang"):
        for limit in limits_of(engine, kind):
            by_limit.setdefault(limit, []).append(ENGINE_TITLES[engine])
    return [f"{', '.join(engines)}: {limit}" for limit, engines in by_limit.items()]
