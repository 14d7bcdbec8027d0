"""DeepSpec's own layout: the published DSpark drafts' and what else we have in it."""

from __future__ import annotations

from deepspec.drafts.configuration import DFLASH, GEMMA4, NESTED, QWEN3, REQUIRED
from deepspec.drafts.eagle3_configuration import EAGLE3_ARCHITECTURES, READABLE
from deepspec.drafts.engines import LLAMA, DraftKind
from deepspec.publishing.formats.base import Config, DraftFolder, Format, Verifier, refuse_causal


class DeepSpecFormat(Format):
    """Holds everything. A config is the target's with the draft's fields; embedding and head are stored."""

    name = "deepspec"
    description = "our own: DSpark, DFlash and Eagle3 as training writes them"

    def recognises(self, folder: DraftFolder) -> bool:
        return bool({QWEN3, GEMMA4, LLAMA, DFLASH, *READABLE} & set(folder.architectures))

    def limits(self, kind: DraftKind) -> list[str]:
        return []

    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        return config

    def from_config(self, config: Config) -> Config:
        names = config.get("architectures") or []
        if READABLE & set(names):
            return config | {"architectures": [EAGLE3_ARCHITECTURES.get(config["model_type"], names[0])]}
        nested = config.get(NESTED) or {}
        refuse_causal(config, is_causal=config.get("is_causal", nested.get("causal")))
        return {name: nested[name] for name in REQUIRED if name in nested} | config
