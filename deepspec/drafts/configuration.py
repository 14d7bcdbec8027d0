"""The config of a draft: Qwen3-shaped for every target, with the fields of a DeepSpec checkpoint set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import Gemma4TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from deepspec.config import ConfigError, near_match
from deepspec.drafts import eagle3_configuration as eagle3
from deepspec.drafts.eagle3_configuration import EAGLE3, LLAMA_EAGLE3, is_eagle3
from deepspec.drafts.families import family_of
from deepspec.drafts.shapes import LayerShape, layer_shape, norm_epsilon, plain_rope, position_limit

ALGORITHMS = ("dspark", "dflash", EAGLE3)
HEAD_TYPES = ("vanilla", "gated", "rnn")
QWEN3, GEMMA4, DFLASH = "Qwen3DSparkModel", "Gemma4DSparkModel", "DFlashDraftModel"
# By model_type, see `architecture_of`. LlamaDSparkModel is loaded, never written: no engine has it.
ARCHITECTURES = {"qwen3": QWEN3, "gemma4_text": GEMMA4, "llama": "LlamaDSparkModel"}
NESTED = "dflash_config"  # where z-lab keeps a draft's own fields
REQUIRED = ("block_size", "mask_token_id", "target_layer_ids")
DEFAULT_CAPTURED_LAYERS = 5
FULL, SLIDING = "full_attention", "sliding_attention"


def architecture_of(config: PreTrainedConfig) -> str:
    """The class of a draft with this config.

    Raises:
        ConfigError: there is none for its `model_type`.
    """
    family_of(config)
    if is_eagle3(config):
        return eagle3.architecture_of(config)
    settings = DraftSettings.of(config)
    if config.model_type == "qwen3" and settings.algorithm == "dflash" and not settings.sample_from_anchor:
        return DFLASH
    return ARCHITECTURES[config.model_type]


def known_architectures(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names under which a draft with this config may be stored.

    Raises:
        ConfigError: there are no drafts of its `model_type`.
    """
    family_of(config)
    if is_eagle3(config):
        return (eagle3.architecture_of(config), eagle3.ALSO_READ)
    return (ARCHITECTURES[config.model_type], *([DFLASH] if config.model_type == "qwen3" else []))


@dataclass(frozen=True)
class DraftSettings:
    """The draft's own fields of a config, with the defaults of configs that do not write all of them."""

    algorithm: str
    block_size: int  # input slots: the anchor and masks; of Eagle3 the steps of its training, which it drafts as well
    sample_from_anchor: bool  # the first slot predicts the token after the anchor; False = it predicts nothing
    mask_token_id: int | None  # Eagle3 has none
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    markov_rank: int
    markov_head_type: str
    confidence_head: bool
    confidence_head_with_markov: bool
    context_window: int | None  # tokens before the anchor that a block sees; None = all
    embedding_scale: float  # factor of the embedding's rows
    logit_scale: float  # factor of the head's logits and of the sequential head's bias
    logit_softcap: float | None  # c in c * tanh(logit / c), before the bias; None = off
    draft_vocab_size: int | None  # tokens that it can propose, see `deepspec.drafts.vocabulary`; None = all

    @property
    def draft_length(self) -> int:
        """Tokens drafted a round: one for every slot that predicts."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @classmethod
    def of(cls, config: PreTrainedConfig) -> DraftSettings:
        """Read a draft's config; a field may be in `dflash_config` alone, where it overrules one of the same name.

        A DFlashDraftModel fills in masks behind its anchor, unless its config says that it samples from the anchor.

        A context window W is what engines call sliding attention without causality: every slot of a block sees the W
        tokens before the anchor, as in the training mask of `speculators`. vLLM's window is |query - key| < W for each
        query, so its slot k (from 0) sees k + 1 tokens fewer.

        Raises:
            ConfigError: it is not the config of a draft, or it asks for what DeepSpec does not have.
        """
        if is_eagle3(config):
            return cls(**eagle3.own_settings(config), **_shared_settings(config))
        fields = {key: _field(config, key) for key in REQUIRED}
        if missing := [key for key, value in fields.items() if value is None]:
            raise ConfigError(f"not the config of a DSpark, DFlash or Eagle3 draft: {', '.join(missing)} missing")
        _check_known(config)
        samples = _field(config, "sample_from_anchor", DFLASH not in (config.architectures or []))
        _check_block_size(fields["block_size"], samples)
        rank = getattr(config, "markov_rank", 0)
        confidence = getattr(config, "enable_confidence_head", False)
        return cls(
            algorithm=getattr(config, "draft_algorithm", None) or ("dspark" if rank or confidence else "dflash"),
            block_size=fields["block_size"],
            sample_from_anchor=samples,
            mask_token_id=fields["mask_token_id"],
            markov_rank=rank,
            markov_head_type=getattr(config, "markov_head_type", None) or "vanilla",
            confidence_head=confidence,
            confidence_head_with_markov=bool(
                confidence and rank and getattr(config, "confidence_head_with_markov", False)
            ),
            **_shared_settings(config),
        )


def _shared_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Those that every draft has."""
    implied_scale = config.hidden_size**0.5 if family_of(config).scales_embedding else 1.0
    proposable = getattr(config, "draft_vocab_size", None)
    return {
        "target_layer_ids": tuple(_field(config, "target_layer_ids")),
        "num_target_layers": _field(config, "num_target_layers", 0),
        "context_window": _context_window(config),
        "embedding_scale": getattr(config, "embedding_scale", implied_scale),
        "logit_scale": getattr(config, "logit_scale", 1.0),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "draft_vocab_size": None if proposable == config.vocab_size else proposable,
    }


def _field(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    nested = _nested(config).get(name)
    return getattr(config, name, default) if nested is None else nested


def _nested(config: PreTrainedConfig) -> dict[str, Any]:
    return getattr(config, NESTED, None) or {}


def _check_block_size(block_size: int, sample_from_anchor: bool) -> None:
    if sample_from_anchor:
        _check_at_least("draft.block_size", block_size, 1)
    elif block_size < 2:
        raise ConfigError(
            f"draft.block_size={block_size}: must be at least 2 with draft.sample_from_anchor=false, where the first "
            "slot predicts nothing"
        )


def _check_known(config: PreTrainedConfig) -> None:
    """Refuse what other DFlash drafts may ask of an engine and would go unnoticed here."""
    for name, usual in (("use_swa", False), ("attention_value_scale", None), ("is_neox_style", True)):
        if (value := _field(config, name, usual)) != usual:
            raise ConfigError(f"{name}={value}: DeepSpec has no such draft")


def _context_window(config: PreTrainedConfig) -> int | None:
    """Read as vLLM reads it: `is_causal`, then `dflash_config.causal`; else sliding layers are causal, full are not."""
    types = getattr(config, "layer_types", None) or [FULL]
    if len(set(types)) > 1 or types[0] not in (FULL, SLIDING):
        raise ConfigError(
            f"layer_types={types}: all layers of a draft must be {FULL}, or all {SLIDING}; DeepSpec has no other draft"
        )
    is_causal = getattr(config, "is_causal", None)
    if is_causal is None:
        is_causal = _nested(config).get("causal", types[0] == SLIDING)
    if is_causal:
        raise ConfigError(
            "the slots of this draft do not see those behind them (is_causal, or sliding_attention without "
            'dflash_config {"causal": false}); DeepSpec has no such draft'
        )
    return config.sliding_window if types[0] == SLIDING else None


def build_draft_config(
    target_config: PreTrainedConfig,
    *,
    algorithm: str,
    num_layers: int,
    block_size: int,
    target_layer_ids: Sequence[int] | None,
    mask_token_id: int | None,
    markov_rank: int,
    markov_head_type: str,
    confidence_head: bool,
    confidence_head_with_markov: bool,
    num_anchors: int,
    sample_from_anchor: bool = True,
    architecture: str = QWEN3,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    sliding_window: int | None = None,
    ttt_length: int = 7,
    step_loss_decay: float = 0.8,
    draft_vocab_size: int | None = None,
    embedding_scale: float = 1.0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    target_model_name_or_path: str | None = None,
    target_revision: str | None = None,
    target_fingerprint: str | None = None,
) -> PreTrainedConfig:
    """The config of a draft for this target, of any family. Reads no weights.

    Args:
        block_size: input slots of a block.
        target_layer_ids: captured decoder layers, 0-based, -1 = embedding output; None = `default_layer_ids`.
        block_size: input slots of a block. It, mask_token_id, num_anchors, sliding_window and the heads' are not of
            Eagle3, which has none of them.
        sample_from_anchor: the first slot predicts the token after the anchor; False = DFlash's own convention, in
            which the masks alone predict: block_size - 1 tokens. Such a DFlash becomes a DFlashDraftModel.
        architecture: Qwen3DSparkModel, Gemma4DSparkModel for a Gemma 4 target, or of Eagle3 Qwen3Eagle3Model
            or LlamaEagle3Model.
        num_heads, num_kv_heads, head_dim, intermediate_size: of the draft's layers; None = see `layer_shape`.
        sliding_window: context tokens that a block sees; None = all. Stored as engines read it: sliding layers that are
            not causal, see `DraftSettings.of`.
        ttt_length, step_loss_decay: of Eagle3: the steps of its training, and the factor of the loss from one to the
            next.
        draft_vocab_size: tokens that the draft can propose; None, or as many as the target has or more, = all.
        embedding_scale, logit_scale, final_logit_softcapping: what the target does to the rows of its embedding and to
            the logits of its head (scaled first, then capped); the draft does the same. For Gemma4DSparkModel the
            embedding scale is implied. Written where they differ from the default.

    Raises:
        ConfigError: a value that cannot work, with its key, the value and what is allowed.
    """
    target_config = target_config.get_text_config()
    depth, vocab, hidden = (
        _required(target_config, name) for name in ("num_hidden_layers", "vocab_size", "hidden_size")
    )
    layer_ids = default_layer_ids(depth, algorithm) if target_layer_ids is None else list(target_layer_ids)
    _check_choice("draft.algorithm", algorithm, ALGORITHMS)
    if algorithm == EAGLE3:
        eagle3.check_settings(num_layers, architecture, sliding_window)
    else:
        _check_choice("draft.architecture", architecture, (QWEN3, GEMMA4))
    _check_at_least("draft.num_layers", num_layers, 1)
    _check_block_size(block_size, sample_from_anchor)
    _check_at_least("draft.ttt_length", ttt_length, 1)
    _check_at_least("train.num_anchors", num_anchors, 1)
    sizes = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
    }
    for key, value in (sizes | {"sliding_window": sliding_window, "vocab_size": draft_vocab_size}).items():
        if value is not None:
            _check_at_least(f"draft.{key}", value, 1)
    if algorithm != EAGLE3 and (mask_token_id is None or not 0 <= mask_token_id < vocab):
        raise ConfigError(f"draft.mask_token_id={mask_token_id}: must be a token of the target, 0 to {vocab - 1}")
    _check_layer_ids(layer_ids, depth)
    _check_heads(algorithm, markov_rank, markov_head_type, confidence_head, confidence_head_with_markov)
    if markov_rank > hidden:
        raise ConfigError(f"draft.markov_rank={markov_rank}: must be at most the target's hidden size {hidden}")

    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "rms_norm_eps": norm_epsilon(target_config),
        "initializer_range": getattr(target_config, "initializer_range", None) or Qwen3Config.initializer_range,
        "max_position_embeddings": position_limit(target_config),
        "dtype": target_config.dtype,
        "tie_word_embeddings": False,
        **{name: getattr(target_config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "num_target_layers": depth,
        "target_layer_ids": layer_ids,
        "target_model_name_or_path": target_model_name_or_path,
        "target_revision": target_revision,
        "target_fingerprint": target_fingerprint,
        "draft_algorithm": algorithm,
    }
    if algorithm == EAGLE3:
        fields |= eagle3.own_fields(ttt_length, step_loss_decay)
    else:
        fields |= {
            "block_size": block_size,
            "sample_from_anchor": sample_from_anchor,
            "mask_token_id": mask_token_id,
            "num_anchors": num_anchors,
            "enable_confidence_head": confidence_head,
            "markov_rank": markov_rank,
        }
    if confidence_head:
        fields["confidence_head_with_markov"] = confidence_head_with_markov
    if markov_rank:
        fields["markov_head_type"] = markov_head_type
    if draft_vocab_size is not None and draft_vocab_size < vocab:
        fields["draft_vocab_size"] = draft_vocab_size
    if logit_scale != 1:
        fields["logit_scale"] = logit_scale
    if final_logit_softcapping is not None:
        fields["final_logit_softcapping"] = final_logit_softcapping
    if architecture == GEMMA4:
        if not sample_from_anchor:
            raise ConfigError(f"draft.sample_from_anchor=false: no engine has it for {GEMMA4}; set {QWEN3}")
        return _gemma4_config(target_config, fields, sizes, sliding_window, embedding_scale)
    if embedding_scale != 1:
        fields["embedding_scale"] = embedding_scale
    fields["architectures"] = [architecture]
    return _qwen3_config(target_config, fields, layer_shape(target_config, **sizes), sliding_window)


def _qwen3_config(
    target: PreTrainedConfig, fields: dict[str, Any], shape: LayerShape, sliding_window: int | None
) -> PreTrainedConfig:
    fields = fields | {
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "rope_parameters": plain_rope(target),
        "layer_types": [FULL if sliding_window is None else SLIDING] * fields["num_hidden_layers"],
    }
    nested: dict[str, Any] = {"causal": False}
    if sliding_window is not None:
        fields |= {"use_sliding_window": True, "sliding_window": sliding_window, "is_causal": False, NESTED: nested}
    config = (LlamaConfig if fields["architectures"] == [LLAMA_EAGLE3] else Qwen3Config)(**fields)
    config.architectures = [architecture_of(config)]
    if config.architectures == [DFLASH]:
        config.dflash_config = {name: fields[name] for name in ("mask_token_id", "target_layer_ids")} | nested
    return config


def _gemma4_config(
    target: PreTrainedConfig,
    fields: dict[str, Any],
    sizes: dict[str, int | None],
    sliding_window: int | None,
    embedding_scale: float,
) -> PreTrainedConfig:
    """Layers like the target's full-attention ones, without experts and per-layer inputs."""
    if not isinstance(target, Gemma4TextConfig):
        raise ConfigError(
            f"draft.architecture={GEMMA4}: only for Gemma 4 targets, and this is {target.model_type}; set {QWEN3}, "
            "which is for every target"
        )
    if sliding_window is not None:
        raise ConfigError(
            f"draft.sliding_window={sliding_window}: {GEMMA4} has full attention only, because a Gemma 4 config makes "
            f"the last layer full; set it to null, or draft.architecture={QWEN3}"
        )
    implied = fields["hidden_size"] ** 0.5
    if embedding_scale != 1 and not math.isclose(embedding_scale, implied, rel_tol=2**-8):  # it may be that in bfloat16
        raise ConfigError(
            f"draft.architecture={GEMMA4}: its embedding is scaled by sqrt(hidden size), that of the target by "
            f"{embedding_scale:g}; set {QWEN3}"
        )
    shape = layer_shape(next(layer for layer, kind in _layers(target) if kind == FULL), **sizes)
    rope = target.rope_parameters or {}
    fields = {"final_logit_softcapping": target.final_logit_softcapping} | fields
    fields |= {
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "num_global_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "global_head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "hidden_activation": target.hidden_activation,
        "attention_k_eq_v": target.attention_k_eq_v,
        "attention_bias": target.attention_bias,
        "rope_parameters": {FULL: dict(rope[FULL])},
        "layer_types": [FULL] * fields["num_hidden_layers"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    }
    return Gemma4TextConfig(architectures=[GEMMA4], **fields)


def _layers(target: Gemma4TextConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    """The config and the type of every layer."""
    return zip(target.per_layer_config, target.layer_types or [], strict=True)


def uniform_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same config, with the sizes of its layers where every reader finds them; Gemma 4 keeps them for each layer.

    Raises:
        ConfigError: layers of different sizes.
    """
    if not config.is_heterogeneous:
        return config
    layers = {(layer.head_dim, layer.num_key_value_heads) for layer in config.per_layer_config}
    if len(layers) > 1:
        raise ConfigError(f"layer_types={config.layer_types}: all layers of a draft must have the same sizes")
    ((head_dim, kv_heads),) = layers
    fields = {name: value for name, value in config.to_dict().items() if name != "per_layer_config"}
    fields |= {"head_dim": head_dim, "global_head_dim": head_dim}
    fields |= {"num_key_value_heads": kv_heads, "num_global_key_value_heads": kv_heads}
    return type(config).from_dict(fields)


def default_layer_ids(depth: int, algorithm: str = "dspark") -> list[int]:
    """Up to five layers spread evenly from the second to the third last, as in the published drafts.

    36 layers give 1, 9, 17, 25, 33 and 40 layers give 1, 10, 19, 28, 37. Eagle3 gets five wherever there are five.
    """
    last = max(depth - 3, 0 if depth > 1 else -1)
    first = min(1, last)
    count = min(DEFAULT_CAPTURED_LAYERS, last - first + 1)
    if algorithm == EAGLE3 and count < DEFAULT_CAPTURED_LAYERS:
        return list(range(depth - 1))[-DEFAULT_CAPTURED_LAYERS:] or [-1]
    return [first + round(i * (last - first) / max(count - 1, 1)) for i in range(count)]


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}.{near_match(str(value), allowed)}")


def _check_at_least(key: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ConfigError(f"{key}={value}: must be at least {smallest}")


def _required(target: PreTrainedConfig, name: str) -> int:
    value = getattr(target, name, None)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{name} is missing in the target's config (model_type {target.model_type}): a draft needs a language "
            "model with one stack of layers"
        )
    return value


def _check_layer_ids(layer_ids: list[int], depth: int) -> None:
    allowed = (
        f"allowed are strictly increasing ids from -1 (embedding output) to {depth - 2}; the target has {depth} layers"
    )
    if not layer_ids:
        raise ConfigError(f"draft.target_layer_ids=[]: name at least one layer; {allowed}")
    if depth - 1 in layer_ids:
        raise ConfigError(
            f"draft.target_layer_ids={layer_ids}: {depth - 1} is the final layer, whose state is stored after the "
            f"final norm and cannot be captured; {allowed}"
        )
    if min(layer_ids) < -1 or max(layer_ids) >= depth:
        raise ConfigError(f"draft.target_layer_ids={layer_ids}: out of range; {allowed}")
    if any(later <= earlier for earlier, later in pairwise(layer_ids)):
        raise ConfigError(f"draft.target_layer_ids={layer_ids}: not strictly increasing; {allowed}")


def _check_heads(algorithm: str, rank: int, head_type: str, confidence: bool, confidence_with_markov: bool) -> None:
    _check_at_least("draft.markov_rank", rank, 0)
    _check_choice("draft.markov_head_type", head_type, HEAD_TYPES)
    if confidence and confidence_with_markov and not rank:
        raise ConfigError(
            "draft.confidence_head_with_markov=true: needs draft.markov_rank above 0; set it, or set this to false"
        )
    if algorithm != "dspark" and (rank or confidence):
        raise ConfigError(
            f"draft.algorithm={algorithm} has no heads, but draft.markov_rank={rank} and "
            f"draft.confidence_head={confidence}; set 0 and false, or choose dspark"
        )
