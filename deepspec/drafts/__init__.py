"""What is trained: a parallel backbone with optional sequential and confidence heads."""

from deepspec.drafts.configuration import DraftSettings, build_draft_config, default_layer_ids
from deepspec.drafts.dspark import (
    DFlashDraftModel,
    DSparkModel,
    Gemma4DSparkModel,
    LlamaDSparkModel,
    Qwen3DSparkModel,
    build_draft,
)
from deepspec.drafts.engines import engine_limits
from deepspec.drafts.loading import check_target, load_draft

__all__ = [
    "DFlashDraftModel",
    "DSparkModel",
    "DraftSettings",
    "Gemma4DSparkModel",
    "LlamaDSparkModel",
    "Qwen3DSparkModel",
    "build_draft",
    "build_draft_config",
    "check_target",
    "default_layer_ids",
    "engine_limits",
    "load_draft",
]
