"""Every engine that is looked at."""

from __future__ import annotations

from deepspec.publishing.engines.base import Engine, Finding, Level, Serving
from deepspec.publishing.engines.sglang import SGLang
from deepspec.publishing.engines.speculators import Speculators
from deepspec.publishing.engines.transformers import Transformers
from deepspec.publishing.engines.vllm import VLLM

ENGINES: dict[str, Engine] = {each.name: each for each in (VLLM(), SGLang(), Transformers(), Speculators())}

__all__ = ["ENGINES", "Engine", "Finding", "Level", "Serving"]
