"""Rows of datasets on the Hub, and of folders written by `datasets.save_to_disk`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deepspec.data.jsonl import DataError
from deepspec.data.nulls import without_nulls

PREFIX = "hub:"
SPELLING = "hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]"
PATTERN = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[^/@:]+))?(@(?P<revision>[^:]+))?(:(?P<split>.+))?", re.ASCII
)
LONGEST_REASON = 300  # characters of what the library says
Result = TypeVar("Result")


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the Hub. The split is "train" unless another is named."""

    repo: str
    config: str | None
    revision: str | None
    split: str

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"{PREFIX}{self.repo}{config}{f'@{self.revision}' if self.revision else ''}:{self.split}"

    def digest(self) -> str:
        """SHA-256 over the commit of the repository, the configuration and the split.

        Raises:
            DataError: the Hub cannot be asked and nothing is cached.
        """
        from datasets import load_dataset_builder

        builder = self._asking(lambda: load_dataset_builder(self.repo, self.config, revision=self.revision))
        identity = [self.repo, builder.config.name, builder.hash, self.split]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows as they come over the network; with the Hub switched off (HF_HUB_OFFLINE=1), from the local cache.

        Raises:
            DataError: there is no such dataset, configuration or split, or it cannot be reached.
        """
        import datasets

        # A slice (train[:1000]) and the cache are only known to the loader that fetches whole files.
        streaming = not datasets.config.HF_HUB_OFFLINE and "[" not in self.split
        rows = self._asking(
            lambda: iter(
                datasets.load_dataset(
                    self.repo, self.config, split=self.split, revision=self.revision, streaming=streaming
                )
            )
        )
        while (row := self._asking(lambda: next(rows, None))) is not None:
            yield row

    def _asking(self, ask: Callable[[], Result]) -> Result:
        try:
            return ask()
        except Exception as error:  # the library raises dozens of kinds, for names, networks, scripts and files
            reason = " ".join(str(error).split())
            reason = reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "..."
            raise DataError(
                f"{self}: cannot be read from the Hub ({type(error).__name__}: {reason}); check the name, the split "
                "and the network, or download it and give its folder"
            ) from error


def parse_hub_source(source: str) -> HubSource | None:
    """What `hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]` means; None for any other source.

    Raises:
        DataError: it begins with `hub:` but goes on in another way.
    """
    if not source.startswith(PREFIX):
        return None
    match = PATTERN.fullmatch(source)
    if match is None:
        raise DataError(f"{source}: expected {SPELLING}, for example hub:mlabonne/open-perfectblend:train")
    return HubSource(match["repo"], match["config"], match["revision"], match["split"] or "train")


def read_hub_rows(source: HubSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row), `place` being "hub:OWNER/NAME:SPLIT, row N".

    Raises:
        DataError: see `HubSource.rows`.
    """
    for number, row in enumerate(source.rows(), start=1):
        yield f"{source}, row {number}", without_nulls(row)


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved dataset, in order.

    Raises:
        DataError: it is several splits, or its description is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(
            f"{folder}: a saved dataset with the splits {', '.join(splits) or '(none)'}; name the one to read"
            + (f", for example {folder / splits[0]}" if splits else "")
        )
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'}: not of a saved dataset ({error!r})") from error


def read_saved_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a dataset saved with `save_to_disk`, memory-mapped.

    Raises:
        DataError: it is several splits, or damaged.
    """
    from datasets import load_from_disk

    saved_files(folder)
    try:
        rows = load_from_disk(str(folder))
    except Exception as error:  # as above
        raise DataError(f"{folder}: a saved dataset that cannot be loaded ({error}); save it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{folder}, row {number}", without_nulls(row)
