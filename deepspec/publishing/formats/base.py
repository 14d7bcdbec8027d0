"""What a checkpoint format is: a table of what it holds, and a config on the way out and on the way in.

Between two formats a draft is in DeepSpec's own layout: `config.json` as a dictionary, and tensors under our names. A
new format is one file with one subclass of `Format`, listed in `deepspec.publishing.formats`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError

from deepspec.drafts.configuration import DFLASH, FULL, GEMMA4, SLIDING
from deepspec.drafts.engines import LLAMA, DraftKind
from deepspec.drafts.families import FAMILIES
from deepspec.publishing.errors import PublishError
from deepspec.publishing.layout import EMBEDDING, HEAD
from deepspec.publishing.tables import OUR_TABLES, Tables
from deepspec.publishing.weights import AnyTensor

Config = dict[str, Any]
EMBEDDING_AND_HEAD = frozenset({EMBEDDING, HEAD})
# Of no meaning outside the folder that they were written in.
NOT_KEPT = ("architectures", "auto_map", "transformers_version", "model_type", "_name_or_path")
# What DeepSpec knows in a `dflash_config`; anything else changes what the draft computes.
KNOWN_NESTED = ("mask_token_id", "mask_token", "target_layer_ids", "block_size", "num_target_layers", "causal")


@dataclass(frozen=True)
class DraftFolder:
    """A draft as it lies on the disk, in any format."""

    path: Path
    config: Config
    tensors: Mapping[str, AnyTensor] = field(default_factory=dict)

    @property
    def architectures(self) -> list[str]:
        return [str(name) for name in self.config.get("architectures") or []]


@dataclass(frozen=True)
class Verifier:
    """The target of a draft, as formats name it."""

    name: str  # Hub id or folder
    architectures: list[str]  # empty = not known


class Format(ABC):
    """One layout of draft checkpoints."""

    name: ClassVar[str]
    description: ClassVar[str]
    # Tensors that its readers take from the target.
    left_out: ClassVar[frozenset[str]] = frozenset()
    # Tensors that may be missing in what others wrote.
    optional: ClassVar[frozenset[str]] = EMBEDDING_AND_HEAD
    # Our name of a tensor -> its name.
    renamed: ClassVar[Mapping[str, str]] = {}
    tables: ClassVar[Tables] = OUR_TABLES
    # Of embedding and head, those that it must hold; others are kept if they are there.
    needed: ClassVar[frozenset[str]] = EMBEDDING_AND_HEAD
    names_verifier: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, folder: DraftFolder) -> bool:
        """Whether a folder is in this format."""

    @abstractmethod
    def limits(self, kind: DraftKind) -> list[str]:
        """What of such a draft it cannot hold, a clause each."""

    @abstractmethod
    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        """Its config.json from ours."""

    @abstractmethod
    def from_config(self, config: Config) -> Config:
        """Ours from its own.

        Raises:
            PublishError: a draft that DeepSpec does not have.
        """


def fill_in_limits(kind: DraftKind) -> list[str]:
    """Of the formats that hold DFlash drafts alone, without embedding and head."""
    limits = qwen3_limits(kind)
    if kind.algorithm != "dflash":
        limits.append(f"holds DFlash drafts only, and this is of algorithm {kind.algorithm}")
    elif not kind.is_fill_in:
        limits.append(
            "holds DFlash drafts whose first slot predicts nothing (draft.sample_from_anchor=false), and the first "
            "slot of this one predicts the token after the anchor"
        )
    if kind.is_pruned:
        limits.append(f"has no head of its own, so no pruned vocabulary ({kind.draft_vocab_size} words)")
    return limits


def qwen3_limits(kind: DraftKind) -> list[str]:
    """Of the formats that hold Qwen3-shaped drafts alone."""
    return [f"holds Qwen3-shaped drafts only, and this is {kind.architecture}"] if kind.architecture in OTHERS else []


OTHERS = (GEMMA4, LLAMA)
SHAPES = {"qwen3": "Qwen3", "llama": "Llama"}


def complete(config: Mapping[str, Any], what: str, model_type: str = "qwen3") -> Config:
    """All fields of a draft's config, with the defaults of those that are not written, old names renewed.

    Args:
        model_type: of its layers, a key of `FAMILIES`.

    Raises:
        PublishError: a value that cannot be.
    """
    given = {name: value for name, value in config.items() if name not in NOT_KEPT}
    try:
        fields = FAMILIES[model_type].config_class(**given).to_diff_dict()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise PublishError(f"{what}: not the config of {SHAPES[model_type]}-shaped layers ({reason})") from error
    kept = {name: value for name, value in fields.items() if name not in NOT_KEPT}
    return kept | {"model_type": model_type, "tie_word_embeddings": False}


def refuse_causal(config: Mapping[str, Any], *, is_causal: bool | None) -> None:
    """Raises PublishError where a slot does not see those behind it, or layers differ: DeepSpec has no such draft.

    Args:
        is_causal: as the format says it; None = sliding layers are, full ones are not.
    """
    types = list(config.get("layer_types") or [FULL])
    if len(set(types)) > 1 or types[0] not in (FULL, SLIDING):
        raise PublishError(f"layer_types={types}: DeepSpec has drafts with all layers {FULL}, or all {SLIDING}")
    if types[0] == SLIDING if is_causal is None else is_causal:
        raise PublishError("the slots of this draft do not see those behind them (causal); DeepSpec has no such draft")


def as_fill_in(config: Config) -> Config:
    """The fields by which every reader knows a DFlash whose first slot predicts nothing."""
    nested = {name: config[name] for name in ("mask_token_id", "target_layer_ids")}
    return config | {
        "architectures": [DFLASH],
        "sample_from_anchor": False,
        "draft_algorithm": "dflash",
        "dflash_config": nested | {"causal": False},
    }


def with_window(config: Config) -> Config:
    """The fields by which every reader knows that a window is not causal; unchanged where there is none."""
    if SLIDING not in (config.get("layer_types") or ()):
        return config
    return config | {
        "use_sliding_window": True,
        "is_causal": False,
        "dflash_config": (config.get("dflash_config") or {}) | {"causal": False},
    }


def raise_nested(config: Config, *keys: str) -> Config:
    """The config with the fields of nested dictionaries (`dflash_config`, ...) at its top level too.

    Raises:
        PublishError: a nested field that DeepSpec does not know and that is set.
    """
    nested: Config = {}
    for key in keys:
        nested |= config.get(key) or {}
    unknown = sorted(name for name, value in nested.items() if name not in (*KNOWN_NESTED, *OURS) and value)
    if unknown:
        raise PublishError(f"{' and '.join(keys)}: DeepSpec has no draft with {', '.join(unknown)}")
    return config | {name: value for name, value in nested.items() if name not in ("causal", "mask_token")}


# Our own fields that published drafts nest.
OURS = (
    *("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
    *("sample_from_anchor", "num_anchors", "draft_vocab_size"),
)
