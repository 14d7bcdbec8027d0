"""vLLM 0.32: `--speculative-config` with method dspark, dflash or eagle3."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from deepspec.drafts.configuration import QWEN3
from deepspec.drafts.eagle3_configuration import LLAMA_EAGLE3
from deepspec.drafts.engines import DraftKind
from deepspec.drafts.loading import SEPARATE_MASK
from deepspec.publishing.convert import OpenedDraft
from deepspec.publishing.engines.base import (
    Engine,
    Finding,
    Serving,
    care,
    check_count,
    check_embedding,
    check_layer_ids,
    check_rope,
    check_window,
    fails,
    fine,
    slides,
)
from deepspec.publishing.formats import DraftFolder, Format, eagle3

# Architectures of drafts that it has and DeepSpec does not, with the method that they run under.
OTHER_DRAFTS = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3LlamaForCausalLM": "eagle3",
    "Eagle3Qwen3ForCausalLM": "eagle3",
    "Eagle3DeepseekV2ForCausalLM": "eagle3",
    "DFlashDraftModel": "dflash",
    "DFlash2DraftModel": "dflash",
    "LiLiCorrDraftModel": "dflash",
    "Qwen3XPressModel": "dspark",
    "Qwen3DSparkModel": "dspark",
    "Gemma4DSparkModel": "dspark",
}
SPECULATORS_TYPES = {
    "eagle3": "eagle3",
    "peagle": "eagle3",
    "dflash": "dflash",
    "dflash2": "dflash",
    "dspark": "dspark",
}
EAGLE3_LAYERS = ("qwen3", "llama")


class VLLM(Engine):
    name, title, version = "vllm", "vLLM", "0.32"
    formats = ("speculators", "deepspec", "sglang", "zlab", "transformers", "eagle3")

    def unread(self, kind: DraftKind, its_format: Format) -> str | None:
        if kind.algorithm == "eagle3" and its_format.name not in ("speculators", "eagle3"):
            chosen = "eagle3 or speculators" if kind.architecture == LLAMA_EAGLE3 else "speculators"
            return f"has no {kind.architecture}: export it with format={chosen}"
        return super().unread(kind, its_format)

    def no_target(self, serving: Serving) -> str | None:
        if serving.target_gguf_file is None:
            return None
        return (
            f"has no loader for the target's GGUF file {serving.target_gguf_file}: save it as safetensors first "
            "(Transformers' gguf_file=, save_pretrained)"
        )

    def traps(self, draft: OpenedDraft) -> Iterator[Finding]:
        folder, kind = draft.folder, draft.kind
        if kind.is_fill_in and QWEN3 in folder.architectures:
            yield fails(f"takes {QWEN3} for a DSpark draft; write architectures [DFlashDraftModel] into config.json")
        yield from check_method(folder, kind.algorithm)
        if kind.algorithm == "dspark":
            yield fine(f"num_speculative_tokens may be left out: block_size = {kind.draft_length}")
            yield care("runs with its newer model runner alone, which needs a GPU")
        else:
            yield care(f"num_speculative_tokens must be given: up to {kind.draft_length}")
        if draft.format.name == "speculators":
            yield from check_speculators_section(folder.config)
        if kind.algorithm == "eagle3":
            yield from check_eagle3(draft)
        else:
            yield from check_causal(folder.config, kind)
        yield from check_layer_ids(draft, lowest=-1)
        yield from check_rope(draft.config)
        yield from check_window(draft)
        yield from check_embedding(draft)
        yield from check_mask_embedding(folder)

    def examine_unknown(self, folder: DraftFolder) -> Iterator[Finding]:
        kind = folder.config.get("speculators_model_type")
        known = [name for name in folder.architectures if name in OTHER_DRAFTS]
        if kind is not None:
            if kind not in SPECULATORS_TYPES:
                yield fails(f"has no speculators_model_type {kind}, only {', '.join(SPECULATORS_TYPES)}")
                return
            yield fine(f"speculators_model_type {kind} runs under method {SPECULATORS_TYPES[kind]}")
            yield from check_speculators_section(folder.config)
        elif known:
            yield fine(f"{known[0]} runs under method {OTHER_DRAFTS[known[0]]}")
            yield from check_method(folder, OTHER_DRAFTS[known[0]])
        else:
            yield fails(f"has no draft class {', '.join(folder.architectures) or '(architectures missing)'}")
            return
        yield from check_pruned(folder)
        yield care("DeepSpec does not know this draft, so names and shapes of its tensors were not compared")

    def command(self, serving: Serving) -> str:
        settings: dict[str, Any] = {"method": serving.kind.algorithm, "model": serving.draft}
        if serving.draft_revision:
            settings["revision"] = serving.draft_revision
        settings["num_speculative_tokens"] = serving.kind.draft_length
        settings["draft_sample_method"] = "probabilistic"
        words = [f"vllm serve {serving.target_word}"]
        if serving.target_revision:
            words.append(f"--revision {shlex.quote(serving.target_revision)}")
        return serving.in_shell(" ".join(words), f"--speculative-config {shlex.quote(json.dumps(settings))}")

    def features(self, serving: Serving) -> list[str]:
        sentences = [
            "Without `probabilistic` the draft proposes its most probable tokens, and fewer are accepted at "
            "temperatures above 0."
        ]
        if serving.kind.confidence_head:
            sentences.append('The confidence head is used with `"enable_adaptive_verification": true` only.')
        if serving.has_calibration:
            sentences.append("The calibration is not used.")
        return sentences


def guessed_method(path: str, architectures: list[str]) -> str | None:
    """What it takes for the method where none is given: by the whole path first, then by the architecture."""
    lowered = path.lower() + (" dflash" if "MuseGlimmerAssistantModel" in architectures else "")
    for part, method in (("eagle-", "eagle"), ("eagle3", "eagle3"), ("dflash", "dflash"), ("dspark", "dspark")):
        if part in lowered:
            return method
    is_dspark = {"Qwen3DSparkModel", "Gemma4DSparkModel", "DSparkDraftModel", "DSparkSpeculator"} & set(architectures)
    return "dspark" if is_dspark else None


def check_method(folder: DraftFolder, method: str) -> Iterator[Finding]:
    guess = guessed_method(str(folder.path), folder.architectures)
    if guess == method:
        yield fine(f"method {method}, also where none is given")
    elif guess is None:
        yield care(f'method must be given: "method": "{method}"')
    else:
        yield care(f'method must be given: "method": "{method}"; from the path it would guess {guess}')


def check_speculators_section(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What it reads of the speculators format, and takes for granted where a field is missing."""
    section, kind = config.get("transformer_layer_config"), config.get("speculators_model_type")
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    if not isinstance(section, Mapping):
        yield fails("transformer_layer_config is missing; export it again")
        return
    if "name_or_path" not in verifier or "speculative_tokens" not in methods[0]:
        yield fails("speculators_config lacks the verifier's name_or_path or speculative_tokens; export it again")
    if kind == "dspark" and "sample_from_anchor" not in config:
        yield fails("sample_from_anchor is missing and taken for false; write it into config.json (true for DSpark)")
    if kind == "dflash" and config.get("sample_from_anchor"):
        yield fails("refuses a dflash with sample_from_anchor true")
    if kind == "eagle3" and section.get("model_type", "llama") not in EAGLE3_LAYERS:
        yield fails(f"has Eagle3 with layers of {' and '.join(EAGLE3_LAYERS)} only, not {section['model_type']}")
    if kind == "eagle3" and "norm_before_residual" not in config:
        yield fails("norm_before_residual is missing and taken for true; write it into config.json")


def check_eagle3(draft: OpenedDraft) -> Iterator[Finding]:
    """What it captures for an Eagle3, and how many layers it takes that for."""
    config, layers = draft.folder.config, list(draft.kind.target_layer_ids)
    if draft.kind.architecture == LLAMA_EAGLE3:
        yield from check_count(config.get("transformer_layer_config") or config, draft)
    if config.get(eagle3.LAYERS):
        return
    counted = (config.get(eagle3.SECTION) or {}).get(eagle3.LAYERS)
    if counted or layers != eagle3.default_layers(draft.config.get("num_target_layers") or 0):
        yield fails(
            f"would capture other layers: it reads {eagle3.LAYERS} at the top level, counted from the embedding, which "
            f"is missing; write {[layer + 1 for layer in layers]} there"
        )


def check_causal(config: Mapping[str, Any], kind: DraftKind) -> Iterator[Finding]:
    """Whether it lets a slot see those behind it, by its own order of fields."""
    section = config.get("transformer_layer_config") or config
    causal = section.get("is_causal")
    where = "is_causal"
    if causal is None and config.get("speculators_model_type") == "dflash":
        causal, where = not config.get("sliding_window_non_causal", True), "sliding_window_non_causal"
    elif causal is None and "speculators_model_type" not in config:
        causal, where = (config.get("dflash_config") or {}).get("causal"), "dflash_config.causal"
    if causal is None:
        causal, where = slides(section), "layer_types"
    if causal:
        remedy = (
            '"sliding_window_non_causal": true'
            if config.get("speculators_model_type") == "dflash"
            else '"is_causal": false' + (" in transformer_layer_config" if "transformer_layer_config" in config else "")
        )
        yield fails(f"slots would not see those behind them (by {where}); write {remedy} into config.json")
    else:
        yield fine("all slots of a block see each other")


def check_pruned(folder: DraftFolder) -> Iterator[Finding]:
    """Of a draft of another family: its pruned vocabulary."""
    tensors, config = folder.tensors, folder.config
    size = config.get("draft_vocab_size")
    if size in (None, (config.get("transformer_layer_config") or config).get("vocab_size")):
        return
    mapping, head = tensors.get("d2t"), tensors.get("lm_head.weight")
    if mapping is None:
        yield fails(f"draft_vocab_size={size} and no d2t in the weights; copy them again")
    elif mapping.dtype != "I64" or mapping.shape != (size,):
        yield fails(f"d2t is {mapping.dtype} {list(mapping.shape)}, it wants I64 [{size}]; convert it")
    elif head is not None and head.shape[0] != size:
        yield fails(f"lm_head.weight has {head.shape[0]} rows, draft_vocab_size is {size}")
    else:
        yield fine(f"pruned vocabulary of {size} words with d2t")


def check_mask_embedding(folder: DraftFolder) -> Iterator[Finding]:
    if (folder.path / SEPARATE_MASK).is_file():
        yield care(f"{SEPARATE_MASK} lies there and takes the place of the mask token's row")
