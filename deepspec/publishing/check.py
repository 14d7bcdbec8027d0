"""`check`: what engines would do with a folder, from its config and the headers of its weights, without the engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspec.checkpoints import DRAFT
from deepspec.config import ConfigError, near_match
from deepspec.drafts.loading import find_draft_folder
from deepspec.publishing.convert import open_draft
from deepspec.publishing.engines import ENGINES, Finding, Level
from deepspec.publishing.engines.base import care, fails, fine
from deepspec.publishing.errors import WRONG_FIELDS, DamagedDraftError, PublishError, wrong_field
from deepspec.publishing.formats import DraftFolder, find_format
from deepspec.publishing.reading import pickled_files, read_folder


@dataclass
class CheckOptions:
    """Read a folder as an engine would, and say what is fine, what needs care and what would fail."""

    path: str = "???"  # folder of a draft, of any format; or a checkpoint, or a training run (its newest checkpoint)
    engine: str | None = None  # vllm, sglang, transformers or speculators; null = all


@dataclass(frozen=True)
class Report:
    """What was found in a folder."""

    folder: list[Finding]  # the same for every engine
    engines: dict[str, list[Finding]]  # by name

    def would_fail(self, engine: str) -> bool:
        return _any_fails([*self.folder, *self.engines.get(engine, [])])


def check(options: CheckOptions) -> int:
    """Print the findings. Returns 0 if nothing would fail: for the engine that is named, else for one at least; else 1.

    Raises:
        ConfigError: no such engine.
        FileNotFoundError: no such folder.
    """
    if options.engine is not None and options.engine not in ENGINES:
        raise ConfigError(
            f"engine={options.engine}: must be one of {', '.join(ENGINES)}.{near_match(options.engine, ENGINES)}"
        )
    chosen = [options.engine] if options.engine else list(ENGINES)
    folder = _draft_of(Path(options.path).expanduser())
    report = examine(folder, chosen)
    _print(str(folder), report.folder)
    for name, findings in report.engines.items():
        _print(f"{ENGINES[name].title} {ENGINES[name].version}", findings)
    failing = [name for name in chosen if report.would_fail(name)]
    print(f"would fail: {', '.join(ENGINES[name].title for name in failing) or 'nothing'}")
    return int(len(failing) == len(chosen))


def _draft_of(path: Path) -> Path:
    """Of a checkpoint or a training run the draft that lies in it, which is what an engine is given."""
    if (path / DRAFT).is_dir() or (path / "checkpoints").is_dir():
        return find_draft_folder(path, key="path")
    return path


def examine(path: Path, engines: Iterable[str]) -> Report:
    """Go through a folder for some engines.

    Raises:
        FileNotFoundError: no such folder.
    """
    try:
        folder = read_folder(path)
    except PublishError as error:
        return Report([fails(str(error))], {})
    findings = [fine(f"config.json and {len(folder.tensors)} tensors in safetensors")]
    if pickled := pickled_files(path):
        findings.append(care(f"{', '.join(pickled)} may run code when loaded; readers of safetensors leave them alone"))
    try:
        draft = open_draft(path)
    except DamagedDraftError as error:
        return Report([*findings, fails(str(error))], {})
    except PublishError as error:
        if _is_target(folder):
            return Report([*findings, fails(str(error))], {})
        findings.append(care(f"DeepSpec cannot import it: {error}"))
        return Report(findings, {name: _gone_through(ENGINES[name].examine_unknown(folder)) for name in engines})
    kind = draft.kind
    findings.append(
        fine(f"{kind.algorithm} draft in the {draft.format.name} format, {kind.draft_length} tokens a round")
    )
    return Report(findings, {name: _gone_through(ENGINES[name].examine(draft)) for name in engines})


def _gone_through(findings: Iterator[Finding]) -> list[Finding]:
    """All of them; a field of a type that no reader expects ends them."""
    found = []
    try:
        for finding in findings:
            found.append(finding)
    except WRONG_FIELDS as error:
        found.append(fails(f"config.json: {wrong_field(error)}"))
    return found


def _is_target(folder: DraftFolder) -> bool:
    try:
        find_format(folder)
    except PublishError as error:
        return "a language model" in str(error)
    return False


def _any_fails(findings: Iterable[Finding]) -> bool:
    return any(finding.level is Level.FAILS for finding in findings)


def _print(title: str, findings: Iterable[Finding]) -> None:
    print(f"{title}:")
    for finding in findings:
        print(f"  {finding.level.value:<4}  {finding.text}")
