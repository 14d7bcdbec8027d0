"""The folder that is sent: config, weights, model card and plot, written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepspec.publishing.card import PLOT_NAME, build_card
from deepspec.publishing.convert import TargetChoice, open_draft, write_draft
from deepspec.publishing.errors import PublishError
from deepspec.publishing.formats import FORMATS, Format
from deepspec.publishing.results import Evaluation
from deepspec.publishing.source import DraftSource
from deepspec.publishing.tables import OUR_TABLES, SGLANG_TABLES
from deepspec.publishing.whole_folder import written_whole

CARD_NAME = "README.md"
CALIBRATION_FILES = (OUR_TABLES.calibration.name, SGLANG_TABLES.calibration.name)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def build_folder(
    folder: Path,
    source: DraftSource,
    evaluation: Evaluation | None,
    *,
    repo_id: str,
    its_format: Format,
    target: str | None = None,
    revision: str | None = None,
    license_name: str | None = None,
    plot: Path | None = None,
) -> Path:
    """Write what a repository of this draft holds into `folder`, replacing an earlier one.

    Args:
        evaluation: of this draft; None = the card says that it has not been evaluated.
        its_format: in which config and weights are written.
        target: Hub id, where the format names the target; None = as the draft records it.
        revision: branch that the folder is pushed to; None = main.
        plot: PNG for the card; None = the evaluation's own, if it has one.

    Raises:
        FileNotFoundError: no such plot.
        PublishError: the folder holds other things, or cannot be written.
    """
    plot = _checked_plot(plot or (evaluation.plot if evaluation else None))
    card = build_card(
        source,
        evaluation,
        repo_id=repo_id,
        its_format=its_format,
        revision=revision,
        license_name=license_name,
        with_plot=plot is not None,
    )
    _refuse_foreign_content(folder, source)
    with written_whole(folder, replace=True) as unfinished:
        if its_format is FORMATS["deepspec"]:  # as it is, so that digests stay those of its evaluation
            for name in source.files:
                shutil.copyfile(source.folder / name, unfinished / name)
        else:
            write_draft(open_draft(source.folder), its_format, unfinished, TargetChoice(target), with_sps=False)
        if plot is not None:
            shutil.copyfile(plot, unfinished / PLOT_NAME)
        (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
    return folder


def _checked_plot(plot: Path | None) -> Path | None:
    if plot is None:
        return None
    if not plot.is_file():
        raise FileNotFoundError(f"plot={plot}: no such file; `python -m deepspec.evaluation.report` draws tau.png")
    with plot.open("rb") as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise PublishError(f"plot={plot}: not a PNG picture")
    return plot


def _refuse_foreign_content(folder: Path, source: DraftSource) -> None:
    """Only a folder that an earlier push wrote is replaced."""
    if source.folder.resolve().is_relative_to(folder.resolve()):
        raise PublishError(f"output_dir={folder}: holds the checkpoint that is published; choose another output_dir")
    if not folder.is_dir():
        return
    present = list(folder.iterdir())
    ours = (CARD_NAME, PLOT_NAME, "config.json", *CALIBRATION_FILES)
    foreign = sorted(file.name for file in present if file.name not in ours and ".safetensors" not in file.suffixes)
    if foreign or (present and not (folder / CARD_NAME).is_file()):
        named = ", ".join((foreign or sorted(file.name for file in present))[:5])
        raise PublishError(
            f"output_dir={folder}: holds files that a push did not write ({named}); choose another output_dir"
        )
