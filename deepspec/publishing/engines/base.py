"""What an engine does with a folder, as far as its config and the headers of its weights tell.

Read from the released sources of vLLM 0.32, SGLang 0.5.23, speculators 0.9.0 and Transformers 5.24.0. An engine is one
file with one subclass of `Engine`, listed in `deepspec.publishing.engines`.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from deepspec.drafts.base import LENT
from deepspec.drafts.engines import DraftKind, limits_of
from deepspec.drafts.shapes import KEPT_ROPE_TYPES
from deepspec.publishing.convert import BUILTIN, OpenedDraft
from deepspec.publishing.formats import DraftFolder, Format
from deepspec.publishing.formats.base import SLIDING
from deepspec.publishing.formats.eagle3 import COUNT, DEFAULT_COUNT, LAYERS, SECTION

FIND_BUILTIN = "python -c 'from deepspec.targets import BUILTIN_WEIGHTS; print(BUILTIN_WEIGHTS)'"


class Level(Enum):
    """How bad a finding is."""

    FINE = "ok"
    CARE = "care"  # works, if one knows
    FAILS = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One thing that an engine would do with a folder."""

    level: Level
    text: str


def fine(text: str) -> Finding:
    return Finding(Level.FINE, text)


def care(text: str) -> Finding:
    return Finding(Level.CARE, text)


def fails(text: str) -> Finding:
    return Finding(Level.FAILS, text)


@dataclass(frozen=True)
class Serving:
    """What the commands of a model card need to know."""

    kind: DraftKind
    format: Format
    draft: str  # Hub id or folder
    target: str  # Hub id, `builtin`, or what stands in for it
    draft_revision: str | None = None
    target_revision: str | None = None
    target_gguf_file: str | None = None
    has_calibration: bool = False

    @property
    def is_builtin(self) -> bool:
        return self.target == BUILTIN

    @property
    def target_word(self) -> str:
        """The target in a shell command."""
        return '"$TARGET"' if self.is_builtin else shlex.quote(self.target)

    def in_shell(self, *lines: str) -> str:
        """A code block with one command of several lines."""
        before = f"TARGET=$({FIND_BUILTIN})\n" if self.is_builtin else ""
        return f"```bash\n{before}" + " \\\n  ".join(lines) + "\n```"


class Engine(ABC):
    """A program that reads drafts."""

    name: ClassVar[str]  # a key of `deepspec.drafts.engines.LIMITS`
    title: ClassVar[str]
    version: ClassVar[str]  # whose sources were read
    formats: ClassVar[tuple[str, ...]]  # that it reads; the first is the one to export to

    def obstacles(self, kind: DraftKind, its_format: Format) -> list[str]:
        """Why it cannot serve such a draft in such a format, a clause each; empty if it can."""
        limits = limits_of(self.name, kind)
        if not limits and (why := self.unread(kind, its_format)):
            limits = [why]
        return limits

    def unread(self, kind: DraftKind, its_format: Format) -> str | None:
        """Why it does not read the format, and what to do; None if it does."""
        if its_format.name in self.formats:
            return None
        return f"does not read the {its_format.name} format: {self.advice(kind)}"

    def no_target(self, serving: Serving) -> str | None:
        """Why it cannot serve the target that a card names; None if it can."""
        return None

    def advice(self, kind: DraftKind) -> str:
        return f"export it with format={self.formats[0]}"

    def examine(self, draft: OpenedDraft) -> Iterator[Finding]:
        """Go through a draft that DeepSpec knows."""
        if obstacles := self.obstacles(draft.kind, draft.format):
            yield from (fails(obstacle) for obstacle in obstacles)
        else:
            yield from self.traps(draft)

    @abstractmethod
    def traps(self, draft: OpenedDraft) -> Iterator[Finding]:
        """What in a draft of a format that it reads is fine, and what is not."""

    @abstractmethod
    def examine_unknown(self, folder: DraftFolder) -> Iterator[Finding]:
        """Go through a folder that DeepSpec cannot read as a draft."""

    @abstractmethod
    def command(self, serving: Serving) -> str:
        """How to serve a draft that it can serve: Markdown, a code block and what belongs to it."""

    @abstractmethod
    def features(self, serving: Serving) -> list[str]:
        """What of the draft it uses and what not, a sentence each."""


def check_layer_ids(draft: OpenedDraft, lowest: int) -> Iterator[Finding]:
    ids, depth = list(draft.kind.target_layer_ids), draft.config.get("num_target_layers") or 0
    if min(ids, default=0) < lowest or (depth and max(ids, default=0) >= depth):
        allowed = f"{lowest} to {depth - 1}" if depth else f"{lowest} on"
        yield fails(f"captured layers {ids} are out of range: the target has {allowed}; the draft is of another target")
    else:
        yield fine(f"captured layers {ids} of {depth or 'a target of unknown depth'}")


def check_rope(config: Mapping[str, Any]) -> Iterator[Finding]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = (rope.get("full_attention") or rope).get("rope_type") or rope.get("type") or "default"
    if kind in (*KEPT_ROPE_TYPES, "proportional"):
        yield fine(f"RoPE of type {kind}")
    else:
        yield care(f"RoPE of type {kind}: engines compute it differently from Transformers, or by a row's length")


def check_embedding(draft: OpenedDraft) -> Iterator[Finding]:
    stored = [name for name in LENT if name in draft.tensors]
    yield fine(f"stored: {', '.join(stored)}" if stored else "embedding and head are taken from the target")


def check_count(config: Mapping[str, Any], draft: OpenedDraft) -> Iterator[Finding]:
    """How many captured layers engines take an Eagle3 of Llama shape for."""
    named = (config.get(SECTION) or {}).get(LAYERS)
    count, captured = config.get(COUNT) or len(named or ()) or DEFAULT_COUNT, len(draft.kind.target_layer_ids)
    if count != captured:
        yield fails(f"takes it for a draft of {count} captured layers and it has {captured}; write {COUNT} {captured}")


def check_window(draft: OpenedDraft) -> Iterator[Finding]:
    if draft.kind.context_window is not None:
        yield care(
            f"context window {draft.kind.context_window}: here it counts from each slot and not from the anchor, so "
            "later slots see a few tokens fewer than in training"
        )


def slides(config: Mapping[str, Any]) -> bool:
    return SLIDING in (config.get("layer_types") or ())
