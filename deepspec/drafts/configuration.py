"""The config of a draft: the target's own config class with the fields of a DeepSpec checkpoint set."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedConfig

from deepspec.config import ConfigError, near_match
from deepspec.drafts.families import family_of

ALGORITHMS = ("dspark", "dflash")
HEAD_TYPES = ("vanilla", "gated", "rnn")
ARCHITECTURES = {"qwen3": "Qwen3DSparkModel", "llama": "LlamaDSparkModel"}
DEFAULT_CAPTURED_LAYERS = 5
# Of the target, and wrong in a draft: another depth, quantised weights, another class.
TARGET_ONLY_FIELDS = ("quantization_config", "auto_map", "_name_or_path", "transformers_version", "architectures")


@dataclass(frozen=True)
class DraftSettings:
    """The draft's own fields of a config, with the defaults of configs that do not write all of them."""

    algorithm: str
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    markov_rank: int
    markov_head_type: str
    confidence_head: bool
    confidence_head_with_markov: bool
    context_window: int | None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> DraftSettings:
        """Read a draft's config.

        Raises:
            ConfigError: it is not the config of a DSpark or DFlash draft.
        """
        missing = [key for key in ("block_size", "mask_token_id", "target_layer_ids") if not hasattr(config, key)]
        if missing:
            raise ConfigError(f"not the config of a DSpark or DFlash draft: {', '.join(missing)} missing")
        rank = getattr(config, "markov_rank", 0)
        confidence = getattr(config, "enable_confidence_head", False)
        return cls(
            algorithm=getattr(config, "draft_algorithm", None) or ("dspark" if rank or confidence else "dflash"),
            block_size=config.block_size,
            mask_token_id=config.mask_token_id,
            target_layer_ids=tuple(config.target_layer_ids),
            num_target_layers=getattr(config, "num_target_layers", 0),
            markov_rank=rank,
            markov_head_type=getattr(config, "markov_head_type", None) or "vanilla",
            confidence_head=confidence,
            confidence_head_with_markov=bool(
                confidence and rank and getattr(config, "confidence_head_with_markov", False)
            ),
            context_window=getattr(config, "draft_context_window", None),
        )


def build_draft_config(
    target_config: PreTrainedConfig,
    *,
    algorithm: str,
    num_layers: int,
    block_size: int,
    target_layer_ids: Sequence[int] | None,
    mask_token_id: int,
    markov_rank: int,
    markov_head_type: str,
    confidence_head: bool,
    confidence_head_with_markov: bool,
    num_anchors: int,
    sliding_window: int | None = None,
    target_model_name_or_path: str | None = None,
    target_revision: str | None = None,
    target_fingerprint: str | None = None,
) -> PreTrainedConfig:
    """The config of a draft for this target. Reads no weights.

    Args:
        target_layer_ids: captured decoder layers, 0-based, -1 = embedding output; None = `default_layer_ids`.
        sliding_window: context tokens that a block sees; None = all. Stored as `draft_context_window`.

    Raises:
        ConfigError: a value that cannot work, with its key, the value and what is allowed.
    """
    target_config = target_config.get_text_config()
    family_of(target_config)
    _check_attention(target_config)
    depth = target_config.num_hidden_layers
    layer_ids = default_layer_ids(depth) if target_layer_ids is None else list(target_layer_ids)
    _check_choice("draft.algorithm", algorithm, ALGORITHMS)
    _check_at_least("draft.num_layers", num_layers, 1)
    _check_at_least("draft.block_size", block_size, 1)
    _check_at_least("train.num_anchors", num_anchors, 1)
    if sliding_window is not None:
        _check_at_least("draft.sliding_window", sliding_window, 1)
    if mask_token_id is None or not 0 <= mask_token_id < target_config.vocab_size:
        raise ConfigError(
            f"draft.mask_token_id={mask_token_id}: must be a token of the target, 0 to {target_config.vocab_size - 1}"
        )
    _check_layer_ids(layer_ids, depth)
    _check_heads(algorithm, markov_rank, markov_head_type, confidence_head, confidence_head_with_markov)
    if markov_rank > target_config.hidden_size:
        raise ConfigError(
            f"draft.markov_rank={markov_rank}: must be at most the target's hidden size {target_config.hidden_size}"
        )

    fields = {key: value for key, value in target_config.to_dict().items() if key not in TARGET_ONLY_FIELDS}
    fields |= {
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "tie_word_embeddings": False,
        "num_target_layers": depth,
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "target_layer_ids": layer_ids,
        "num_anchors": num_anchors,
        "enable_confidence_head": confidence_head,
        "markov_rank": markov_rank,
        "target_model_name_or_path": target_model_name_or_path,
        "target_revision": target_revision,
        "target_fingerprint": target_fingerprint,
        "draft_algorithm": algorithm,
    }
    if hasattr(target_config, "use_sliding_window"):
        fields |= {"use_sliding_window": False, "sliding_window": None}
    if confidence_head:
        fields["confidence_head_with_markov"] = confidence_head_with_markov
    if markov_rank:
        fields["markov_head_type"] = markov_head_type
    if sliding_window is not None:
        fields["draft_context_window"] = sliding_window
    config = type(target_config).from_dict(copy.deepcopy(fields))
    config.architectures = [ARCHITECTURES[config.model_type]]
    return config


def default_layer_ids(depth: int) -> list[int]:
    """Up to five layers spread evenly from the second to the third last, as in the published drafts.

    36 layers give 1, 9, 17, 25, 33 and 40 layers give 1, 10, 19, 28, 37.
    """
    last = max(depth - 3, 0 if depth > 1 else -1)
    first = min(1, last)
    count = min(DEFAULT_CAPTURED_LAYERS, last - first + 1)
    return [first + round(i * (last - first) / max(count - 1, 1)) for i in range(count)]


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}.{near_match(str(value), allowed)}")


def _check_at_least(key: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ConfigError(f"{key}={value}: must be at least {smallest}")


def _check_attention(config: PreTrainedConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads={heads} of the target: must be a multiple of num_key_value_heads={kv_heads}"
        )


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
    if algorithm == "dflash" and (rank or confidence):
        raise ConfigError(
            f"draft.algorithm=dflash has no heads, but draft.markov_rank={rank} and "
            f"draft.confidence_head={confidence}; set 0 and false, or choose dspark"
        )
