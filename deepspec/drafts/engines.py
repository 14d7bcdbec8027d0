"""Where serving engines fall short of a draft. Read from vLLM 0.32 and SGLang 0.5.23."""

from __future__ import annotations

from transformers import PreTrainedConfig

from deepspec.drafts.configuration import DFLASH, GEMMA4, QWEN3, DraftSettings, architecture_of
from deepspec.drafts.eagle3_configuration import EAGLE3_ARCHITECTURES, LLAMA_EAGLE3, QWEN3_EAGLE3


def engine_limits(config: PreTrainedConfig) -> list[str]:
    """What a draft of this config needs and an engine cannot do, a clause each; empty if vLLM and SGLang do all."""
    settings, architecture = DraftSettings.of(config), architecture_of(config)
    if architecture in EAGLE3_ARCHITECTURES.values():
        return _eagle3_limits(settings, architecture)
    if architecture not in (QWEN3, GEMMA4, DFLASH):
        return [f"no engine has {architecture}"]
    limits = []
    if architecture != GEMMA4:
        if settings.embedding_scale != 1:
            limits.append(f"vLLM and SGLang do not scale its embedding (embedding_scale={settings.embedding_scale:g})")
        if settings.logit_softcap is not None:
            cap = settings.logit_softcap
            limits.append(f"vLLM and SGLang do not cap its logits (final_logit_softcapping={cap:g})")
        if settings.logit_scale != 1:
            limits.append(f"SGLang does not scale its logits (logit_scale={settings.logit_scale:g})")
    else:
        limits.append(f"SGLang has no {GEMMA4}")
        if not config.attention_k_eq_v:
            limits.append(f"vLLM has {GEMMA4} only with attention_k_eq_v")
        if settings.logit_softcap is not None and settings.markov_rank:
            limits.append("vLLM caps the bias of the sequential head too, not the head's logits alone")
    if architecture == DFLASH:
        return limits  # SGLang takes the target's whole head, and so need not know a vocabulary of the draft's own
    if settings.draft_vocab_size is not None:
        limits.append(f"SGLang has no vocabulary of the draft's own (draft_vocab_size={settings.draft_vocab_size})")
    if settings.markov_rank == 0:
        limits.append(
            "SGLang refuses a draft that samples from the anchor without a sequential head (markov_rank=0), and vLLM "
            "has none; as DFlash they have one that fills in (sample_from_anchor=false)"
        )
    elif settings.markov_head_type != "vanilla":
        limits.append(f"vLLM has only the vanilla sequential head (markov_head_type={settings.markov_head_type})")
    return limits


def _eagle3_limits(settings: DraftSettings, architecture: str) -> list[str]:
    """vLLM reads both shapes, in the layout of `speculators`; states and positions of a chain are the same there."""
    limits = []
    if architecture == QWEN3_EAGLE3:
        limits.append(f"SGLang has no query and key norms in an Eagle3 (draft.architecture={LLAMA_EAGLE3} has none)")
    if settings.embedding_scale != 1:
        limits.append(f"vLLM and SGLang do not scale its embedding (embedding_scale={settings.embedding_scale:g})")
    if settings.logit_softcap is not None:
        cap = settings.logit_softcap
        limits.append(f"vLLM and SGLang do not cap its logits (final_logit_softcapping={cap:g})")
    return limits
