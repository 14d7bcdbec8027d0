"""How conversations were rendered: kept with every draft, so that it is measured on prompts like those it learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deepspec.config import DataConfig, TargetConfig

FIELD = "rendering"  # in the config of a draft
ANSWERS_SETTINGS = ".regenerate/settings.json"  # in a folder that data_prep.regenerate wrote


@dataclass(frozen=True)
class Rendering:
    """What a prompt's text depends on beside its messages."""

    template_sha256: str
    template: str | None  # its text, where it is not the target's own
    template_options: dict[str, Any]
    system_prompt: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Rendering:
        """
        Args:
            tokenizer: with the template of `data.chat_template`, if that is given.
        """
        source = tokenizer.chat_template
        options = json.loads(json.dumps(data.template_options, default=str))
        own = source if data.chat_template is not None else None
        return cls(template_digest(source), own, options, data.system_prompt or None)

    @classmethod
    def recorded_in(cls, draft_config: PreTrainedConfig) -> Rendering | None:
        """That of the draft's training; None where nobody recorded it."""
        record = getattr(draft_config, FIELD, None)
        names = [entry.name for entry in fields(cls)]
        if not isinstance(record, dict) or not set(names) <= record.keys():
            return None
        return cls(**{name: record[name] for name in names})

    def record_in(self, draft_config: PreTrainedConfig) -> None:
        setattr(draft_config, FIELD, asdict(self))

    def keys_given(self) -> dict[str, Any]:
        """The keys of `data` that are not as they are by default."""
        given: dict[str, Any] = {"template_options": self.template_options, "system_prompt": self.system_prompt}
        return {key: value for key, value in given.items() if value} | (
            {"chat_template": "the draft's own"} if self.template else {}
        )

    def differences(self, other: Rendering, where: str = "in training") -> list[str]:
        """In words, what is otherwise than there."""
        found = []
        for key in sorted(self.template_options.keys() | other.template_options.keys()):
            now, before = (options.get(key, "not set") for options in (self.template_options, other.template_options))
            if now != before:
                found.append(f"data.template_options.{key} is {now}, {where} it was {before}")
        if self.system_prompt != other.system_prompt:
            found.append(f"data.system_prompt is {self.system_prompt!r}, {where} it was {other.system_prompt!r}")
        if self.template_sha256 != other.template_sha256:
            found.append(f"the chat template is another one than {where}")
        return found


def differences_of_answers(sources: Sequence[str], rendering: Rendering) -> list[str]:
    """In words, which folders of `data_prep.regenerate` hold answers to prompts that were rendered otherwise."""
    found = []
    for source in sources:
        file = Path(source) / ANSWERS_SETTINGS
        if file.is_file():
            written = json.loads(file.read_text(encoding="utf-8"))
            then = Rendering(
                written["chat_template"], None, written["template_options"], written.get("system_prompt") or None
            )
            found += [f"{source}: {text}" for text in rendering.differences(then, "when it was written")]
    return found


def template_name(data: DataConfig, target: TargetConfig) -> str:
    """How messages call the template."""
    if data.chat_template is not None:
        return f"the chat template {data.chat_template}"
    return f"the chat template of target {target.path}"


def template_digest(source: Any) -> str:
    """SHA-256 of a tokenizer's template, or of its named templates."""
    text = source if isinstance(source, str) else json.dumps(source, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def as_in_training(data: DataConfig, tokenizer: PreTrainedTokenizerBase, trained: Rendering | None) -> DataConfig:
    """The keys that render, filled in where they are not given: options one by one, the system prompt ("" = none), and
    the template, which is set in the tokenizer."""
    if trained is None:
        return data
    if data.chat_template is None and trained.template is not None:
        tokenizer.chat_template = trained.template
    prompt = trained.system_prompt if data.system_prompt is None else data.system_prompt or None
    return replace(data, template_options={**trained.template_options, **data.template_options}, system_prompt=prompt)
