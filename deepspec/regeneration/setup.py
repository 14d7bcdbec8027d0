"""The target as the commands need it: how it is prompted, where its answers end, who it is, and who writes for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError
from deepspec.data.chat import render_prompt
from deepspec.data.conversation import Message
from deepspec.data.rendering import template_digest
from deepspec.data.templates import Tools
from deepspec.decoding import SpeculativeEngine, proposer_of
from deepspec.drafts import load_draft
from deepspec.regeneration.answers import AnswerReader
from deepspec.regeneration.engine_writer import EngineWriter
from deepspec.regeneration.options import TargetOptions, WritingOptions
from deepspec.regeneration.server_writer import ServerWriter
from deepspec.regeneration.text import all_text
from deepspec.regeneration.writer import Writer
from deepspec.targets import (
    describe_target,
    load_target,
    load_target_config,
    load_tokenizer,
    position_range,
    resolve_path,
    stop_tokens,
)
from deepspec.targets.weights import open_weights

POSITIONS_HERE = 4096  # of a slot, unless max_length says otherwise: caches are allocated in full


@dataclass(frozen=True)
class Speaker:
    """What is known of a target without its weights."""

    name: str
    fingerprint: str | None  # of its weights; None where they are not on this machine
    tokenizer: PreTrainedTokenizerBase
    template_options: Mapping[str, Any]
    stop_token_ids: tuple[int, ...]
    positions: int
    reader: AnswerReader

    @property
    def short(self) -> str:
        """Name and beginning of the fingerprint."""
        return self.name if self.fingerprint is None else f"{self.name}@{self.fingerprint[:12]}"

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Raises TemplateError for turns that the template cannot render."""
        return render_prompt(self.tokenizer, messages, self.template_options, tools=tools)

    def settings(self) -> dict[str, Any]:
        """What rows depend on, for the record."""
        template = template_digest(self.tokenizer.chat_template)
        who = {"target": self.name} if self.fingerprint is None else {"target.fingerprint": self.fingerprint}
        return who | {"chat_template": template, "template_options": dict(self.template_options)}


def know_target(options: WritingOptions) -> Speaker:
    """Read the target's config and tokenizer; of its weights the fingerprint, where they are needed or local.

    Raises:
        ConfigError, FileNotFoundError: see `load_tokenizer` and `open_weights`; or there is no chat template.
    """
    target = options.target
    config = load_target_config(target.path, target.revision, target.gguf_file)
    tokenizer = load_tokenizer(
        target.path, revision=target.revision, gguf_file=target.gguf_file, chat_template=options.chat_template
    )
    if not tokenizer.chat_template:
        raise ConfigError(
            f"target.path={target.path}: its tokenizer has no chat template; give one with chat_template=FILE.jinja"
        )
    stops = stop_tokens(target.path, target.revision, tokenizer, target.gguf_file)
    if not stops:
        raise ConfigError(f"target.path={target.path}: names no token that ends an answer (eos_token)")
    return Speaker(
        name=Path(resolve_path(target.path, target.gguf_file)).name if target.path != "builtin" else "builtin",
        fingerprint=_fingerprint(target, is_needed=not options.urls),
        tokenizer=tokenizer,
        template_options=options.template_options,
        stop_token_ids=stops,
        positions=position_range(config),
        reader=AnswerReader(tokenizer, stops),
    )


def _fingerprint(target: TargetOptions, *, is_needed: bool) -> str | None:
    if is_needed:
        return open_weights(target.path, target.revision, target.gguf_file).fingerprint
    with suppress(FileNotFoundError, ConfigError):  # a tokenizer alone is enough to ask servers
        if Path(resolve_path(target.path, target.gguf_file)).is_dir():
            return open_weights(target.path, target.revision, target.gguf_file).fingerprint
    return None


def sampling_settings(options: WritingOptions) -> dict[str, Any]:
    """What rows depend on besides the target, for the record."""
    names = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "max_length", "seed", "model")
    settings = {name: getattr(options, name) for name in names}
    return settings | ({} if options.urls else {"target.dtype": options.target.dtype})


def open_writer(options: WritingOptions, speaker: Speaker, device: torch.device, say: Callable[[str], None]) -> Writer:
    """The engine with the target loaded, or the servers of `urls`.

    Raises:
        ConfigError, FileNotFoundError, ValueError: see `load_target`, `load_draft` and `SpeculativeEngine`.
    """
    if options.urls:
        return ServerWriter(options, speaker, say)
    target = load_target(
        options.target.path,
        revision=options.target.revision,
        gguf_file=options.target.gguf_file,
        dtype=options.target.dtype,
        device=device,
    )
    say(f"{describe_target(target)}, {options.batch_size} rows at once")
    proposer = None
    if options.draft:
        draft = load_draft(
            options.draft, dtype=target.dtype, device=device, target=target, allow_other_target=True
        )  # whatever a draft was made for, the answers are the target's
        proposer = proposer_of(draft, target, allow_other_target=True)
    block = proposer.block_size if proposer else 0
    length = options.max_length or min(POSITIONS_HERE, speaker.positions)
    if length > speaker.positions:
        raise ConfigError(f"max_length={length}: the target has {speaker.positions} positions; give at most that")
    try:
        engine = SpeculativeEngine(
            target,
            proposer,
            slots=options.batch_size,
            max_length=length + block,
            decode=lambda ids: all_text(speaker.tokenizer, ids),
        )
    except ConfigError as error:
        raise ConfigError(str(error).replace("decode.", "")) from error
    return EngineWriter(engine, speaker.tokenizer, options.sampling)
