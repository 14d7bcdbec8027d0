"""Which draft is published: found from a run, a checkpoint or a draft folder, and refused if it would not load."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedConfig
from yaml import YAMLError

from deepspec.checkpoints import TRAINER_STATE, CheckpointError, list_checkpoints, read_trainer_state, verify_checkpoint
from deepspec.decoding.calibration import CALIBRATION_FILE
from deepspec.drafts.base import LENT
from deepspec.drafts.loading import load_draft
from deepspec.files import INDEX_FILE, SINGLE_FILE
from deepspec.publishing.errors import PublishError
from deepspec.publishing.reading import pickled_files


@dataclass(frozen=True)
class DraftSource:
    """A checked draft on this disk and what is known about its training."""

    folder: Path  # config.json and safetensors
    files: tuple[str, ...]  # what of it is published
    config: PreTrainedConfig
    parameters: int  # trained ones: without the target's embedding and head
    step: int | None = None  # optimizer steps done; None = the folder does not say
    training: dict[str, Any] = field(default_factory=dict)  # the run's resolved config; empty = not there


def find_source(path: str | Path) -> DraftSource:
    """Find and check the draft at `path`: a draft folder, a checkpoint, or a run (its newest checkpoint).

    Raises:
        FileNotFoundError: nothing there.
        PublishError: pickled weights, or a damaged or incomplete checkpoint.
    """
    folder = _draft_folder(Path(path).expanduser())
    files = _publishable_files(folder)
    checkpoint = folder.parent if (folder.parent / TRAINER_STATE).is_file() else None
    step = None
    try:
        if checkpoint is not None and folder.name == "draft":
            verify_checkpoint(checkpoint, "draft")
            step = read_trainer_state(checkpoint)["step"]
        draft = load_draft(folder)
    except (CheckpointError, ValueError) as error:
        raise PublishError(f"{error}. {_other_checkpoints(folder)}") from error
    for name, parameter in draft.named_parameters():
        if not torch.isfinite(parameter).all():
            raise PublishError(f"{folder}: {name} contains NaN or infinity. {_other_checkpoints(folder)}")
    parameters = sum(weight.numel() for name, weight in draft.named_parameters() if name not in LENT)
    return DraftSource(folder, files, draft.config, parameters, step, _training_settings(folder))


def _draft_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint={folder}: no such folder; give a training run, a checkpoint or a draft folder on this machine"
        )
    for candidate in (folder, folder / "draft"):
        if (candidate / "config.json").is_file():
            return candidate
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        return checkpoints[-1] / "draft"
    raise FileNotFoundError(
        f"checkpoint={folder}: neither config.json nor checkpoints there; give a training run with at least one "
        "checkpoint, a checkpoint or a draft folder"
    )


def _publishable_files(folder: Path) -> tuple[str, ...]:
    """config.json, the weights and their index, and the calibration if there is one."""
    if not (folder / "config.json").is_file():
        raise PublishError(f"{folder / 'config.json'}: missing. {_other_checkpoints(folder)}")
    if pickled := pickled_files(folder):
        raise PublishError(
            f"{folder}: {', '.join(pickled)} may run code when loaded, so it is not published; load the draft where "
            "you trust it, write it with save_pretrained (safetensors), and publish that folder"
        )
    calibration = [CALIBRATION_FILE] if (folder / CALIBRATION_FILE).is_file() else []
    if (folder / INDEX_FILE).is_file():
        try:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            return ("config.json", *calibration, INDEX_FILE, *sorted(set(index["weight_map"].values())))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PublishError(f"{folder / INDEX_FILE}: damaged ({error}). {_other_checkpoints(folder)}") from error
    if not (folder / SINGLE_FILE).is_file():
        raise PublishError(f"{folder / SINGLE_FILE}: missing; only weights in safetensors are published")
    return ("config.json", *calibration, SINGLE_FILE)


def _run_folder(draft_folder: Path) -> Path | None:
    """The run of RUN/checkpoints/step-00000100/draft."""
    parents = draft_folder.absolute().parents
    return parents[2] if len(parents) > 2 and parents[1].name == "checkpoints" else None


def _other_checkpoints(draft_folder: Path) -> str:
    run = _run_folder(draft_folder)
    others = [] if run is None else [c for c in list_checkpoints(run) if c.name != draft_folder.absolute().parent.name]
    if others:
        return f"To publish another checkpoint of this run, name it: checkpoint={others[-1]}"
    return "Copy it again from where it was written, or train again"


def _training_settings(draft_folder: Path) -> dict[str, Any]:
    """The run's config.yaml; empty when the draft does not lie in a run folder."""
    run = _run_folder(draft_folder)
    if run is None or not (run / "config.yaml").is_file():
        return {}
    try:
        settings = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise PublishError(f"{run / 'config.yaml'}: not readable ({error}); repair or remove it") from error
    if not isinstance(settings, dict):
        raise PublishError(f"{run / 'config.yaml'}: not a list of settings; repair or remove it")
    return {str(key): value for key, value in settings.items()}
