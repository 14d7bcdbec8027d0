"""What is trained: a parallel backbone with optional heads (DSpark, DFlash), or a chain of one layer (Eagle3)."""

from deepspec.drafts.base import DraftModel
from deepspec.drafts.building import build_draft
from deepspec.drafts.configuration import DraftSettings, build_draft_config, default_layer_ids
from deepspec.drafts.dspark import (
    DFlashDraftModel,
    DSparkModel,
    Gemma4DSparkModel,
    LlamaDSparkModel,
    Qwen3DSparkModel,
)
from deepspec.drafts.eagle3 import Eagle3Model, LlamaEagle3Model, Qwen3Eagle3Model
from deepspec.drafts.engines import engine_limits
from deepspec.drafts.loading import check_target, load_draft

__all__ = [
    "DFlashDraftModel",
    "DSparkModel",
    "DraftModel",
    "DraftSettings",
    "Eagle3Model",
    "Gemma4DSparkModel",
    "LlamaDSparkModel",
    "LlamaEagle3Model",
    "Qwen3DSparkModel",
    "Qwen3Eagle3Model",
    "build_draft",
    "build_draft_config",
    "check_target",
    "default_layer_ids",
    "engine_limits",
    "load_draft",
]
