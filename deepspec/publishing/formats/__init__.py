"""Every checkpoint format, in the order in which a folder is asked whether it is of it."""

from __future__ import annotations

from deepspec.config import ConfigError, near_match
from deepspec.publishing.errors import WRONG_FIELDS, DamagedDraftError, PublishError, wrong_field
from deepspec.publishing.formats.assistant import AssistantFormat
from deepspec.publishing.formats.base import DraftFolder, Format, Verifier
from deepspec.publishing.formats.eagle3 import Eagle3Format
from deepspec.publishing.formats.own import DeepSpecFormat
from deepspec.publishing.formats.sglang import SGLangFormat
from deepspec.publishing.formats.speculators import SpeculatorsFormat
from deepspec.publishing.formats.zlab import ZLabFormat

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        SpeculatorsFormat(),
        AssistantFormat(),
        ZLabFormat(),
        SGLangFormat(),
        Eagle3Format(),
        DeepSpecFormat(),
    )
}

__all__ = ["FORMATS", "DraftFolder", "Format", "Verifier", "find_format", "format_named"]


def format_named(name: str) -> Format:
    """Raises ConfigError where there is none of this name."""
    if name not in FORMATS:
        raise ConfigError(f"format={name}: must be one of {', '.join(sorted(FORMATS))}.{near_match(name, FORMATS)}")
    return FORMATS[name]


def find_format(folder: DraftFolder) -> Format:
    """The format of a folder.

    Raises:
        PublishError: it is no draft that DeepSpec knows.
    """
    try:
        for candidate in FORMATS.values():
            if candidate.recognises(folder):
                return candidate
    except WRONG_FIELDS as error:
        raise DamagedDraftError(f"{folder.path / 'config.json'}: {wrong_field(error)}") from error
    raise PublishError(f"{folder.path}: {_what_else(folder)}")


def _what_else(folder: DraftFolder) -> str:
    names = ", ".join(folder.architectures) or "no architectures"
    if any("eagle3" in name.lower() for name in folder.architectures):
        return (
            f"an EAGLE-3 draft with layers of another family ({names}); vLLM and SGLang load it as it is, DeepSpec has "
            "Eagle3 with Qwen3 or Llama layers only"
        )
    if any(name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for name in folder.architectures):
        return f"a language model ({names}), no draft; give the folder of a draft, and this one as target="
    return f"no draft that DeepSpec knows ({names}, model_type {folder.config.get('model_type')})"
