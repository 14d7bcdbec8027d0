"""What Transformers decodes with: its one DFlash class, `MuseGlimmerAssistantModel`, whose layers are Qwen3's.

`AutoModel` loads it and `generate(assistant_model=..., speculation_type="dflash")` drafts with it. vLLM and SGLang read
it too, under its own names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from deepspec.drafts.engines import DraftKind
from deepspec.publishing.formats.base import (
    EMBEDDING_AND_HEAD,
    SLIDING,
    Config,
    DraftFolder,
    Format,
    Verifier,
    as_fill_in,
    fill_in_limits,
)
from deepspec.publishing.formats.zlab import fill_in_config

MODEL_TYPE, ARCHITECTURE = "muse_glimmer_assistant", "MuseGlimmerAssistantModel"


class AssistantFormat(Format):
    """Holds DFlash in the fill-in convention; our own fields stay at the top level."""

    name = "transformers"
    description = "Transformers' DFlash assistant: MuseGlimmerAssistantModel, without embedding and head"
    left_out = EMBEDDING_AND_HEAD
    renamed: ClassVar[Mapping[str, str]] = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    needed = frozenset()

    def recognises(self, folder: DraftFolder) -> bool:
        return folder.config.get("model_type") == MODEL_TYPE or ARCHITECTURE in folder.architectures

    def limits(self, kind: DraftKind) -> list[str]:
        return fill_in_limits(kind)

    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        fields = as_fill_in(config) | {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
        if fields.get("sliding_window") is None:
            fields.pop("sliding_window", None)  # the class wants a number, and reads it for sliding layers alone
        return fields

    def from_config(self, config: Config) -> Config:
        fields = dict(config)
        # Its layers see all slots of a block whether they slide or not.
        fields["is_causal"] = False
        if SLIDING not in (config.get("layer_types") or [SLIDING]):
            fields |= {"sliding_window": None, "use_sliding_window": False}
            fields.pop("is_causal")
        return fill_in_config(fields)
