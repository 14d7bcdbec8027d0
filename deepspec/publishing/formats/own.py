"""DeepSpec's own layout: the published DSpark drafts' and what else we have in it."""

from __future__ import annotations

from deepspec.drafts.engines import EAGLE3, FILL_IN, GEMMA4, LLAMA, DraftKind
from deepspec.publishing.formats.base import Config, DraftFolder, Format, Verifier

QWEN3 = "Qwen3DSparkModel"


class DeepSpecFormat(Format):
    """Holds everything. A config is the target's with the draft's fields; embedding and head are stored."""

    name = "deepspec"
    description = "our own: DSpark, DFlash and Eagle3 as training writes them"

    def recognises(self, folder: DraftFolder) -> bool:
        return bool({QWEN3, GEMMA4, LLAMA, FILL_IN, *EAGLE3} & set(folder.architectures))

    def limits(self, kind: DraftKind) -> list[str]:
        return []

    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        return config

    def from_config(self, config: Config) -> Config:
        return config | {"architectures": [EAGLE3[0] if name in EAGLE3 else name for name in config["architectures"]]}
