"""Checkpoints of a training run: written whole or not at all, verified before they are trusted.

    RUN/checkpoints/step-00000100/draft/              the draft, as `save_pretrained` writes it (weights in safetensors)
                                  state/              the optimizer's state, in safetensors
                                  trainer_state.json  written last: step, settings, size and SHA-256 of every other file

A checkpoint is written in a hidden folder beside its final place, flushed to disk, and renamed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from deepspec.files import flush_folder, sha256_of, write_atomically

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
DRAFT, STATE = "draft", "state"
_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = ".tmp-"
# What a full disk or an unwritable folder raises: the file system, safetensors' and PyTorch's writers.
_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written. The message names the file or the folder."""


def checkpoint_folder(run_folder: str | Path, step: int) -> Path:
    return Path(run_folder) / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    matched = _NAME.fullmatch(folder.name)
    assert matched, folder
    return int(matched[1])


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, valid or not."""
    root = Path(run_folder) / "checkpoints"
    if not root.is_dir():
        return []
    return sorted((f for f in root.iterdir() if f.is_dir() and _NAME.fullmatch(f.name)), key=step_of)


def read_trainer_state(folder: str | Path) -> dict[str, Any]:
    """The content of trainer_state.json.

    Raises:
        CheckpointError: missing or damaged.
    """
    file = Path(folder) / TRAINER_STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state.get("step"), int) or not isinstance(state.get("files"), dict):
            raise ValueError("no step or no list of files")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing, so this is not a complete checkpoint") from error
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({error})") from error
    return state


def verify_checkpoint(folder: str | Path, subfolder: str = "") -> dict[str, Any]:
    """Compare every file with its recorded size, and those under `subfolder` ("" = all) with their SHA-256.

    Returns:
        The content of trainer_state.json.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or changed.
    """
    folder = Path(folder)
    state = read_trainer_state(folder)
    for name, recorded in state["files"].items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != recorded["size"]:
                raise CheckpointError(f"{file}: has {size} bytes, but {recorded['size']} were written")
            if name.startswith(subfolder) and sha256_of(file) != recorded["sha256"]:
                raise CheckpointError(f"{file}: its content differs from what was written (SHA-256)")
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: missing") from error
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    return state


def newest_checkpoint(run_folder: str | Path, subfolder: str = DRAFT) -> Path | None:
    """The newest checkpoint of a run that passes `verify_checkpoint`; a damaged newer one is skipped with a warning."""
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            verify_checkpoint(folder, subfolder)
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
            continue
        return folder
    return None


def write_checkpoint(
    run_folder: str | Path,
    step: int,
    write: Callable[[Path], None],
    trainer_state: dict[str, Any],
    *,
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint atomically. Every rank calls this.

    Args:
        write: writes this rank's files into the folder it is given.
        trainer_state: recorded in trainer_state.json, with the step and the list of files.
        is_main: this rank creates, describes and renames the folder.
        barrier: waits for the other ranks.

    Raises:
        CheckpointError: the folder cannot be written (full disk, no permission). Earlier checkpoints are untouched.
    """
    final = checkpoint_folder(run_folder, step)
    unfinished = final.with_name(f"{_UNFINISHED}{final.name}")
    try:
        if is_main:
            remove_unfinished_checkpoints(run_folder)
            unfinished.mkdir(parents=True)
        barrier()
        write(unfinished)
        barrier()
        if is_main:
            _describe(unfinished, {"step": step, **trainer_state})
            _replace(unfinished, final)
    except _WRITE_ERRORS as error:
        if is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(_explain_failure(final, error)) from error
    barrier()
    return final


def remove_unfinished_checkpoints(run_folder: str | Path) -> None:
    """Delete what a killed run left behind; none may be writing checkpoints there."""
    for folder in (Path(run_folder) / "checkpoints").glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def rotate(run_folder: str | Path, keep: int, newest_step: int) -> None:
    """Keep the checkpoint of `newest_step` and the `keep - 1` before it.

    Later ones belong to a line of training that was given up (this run fell back to an earlier one): they go too.
    """
    folders = list_checkpoints(run_folder)
    kept = [folder for folder in folders if step_of(folder) <= newest_step][-keep:]
    for folder in folders:
        if folder not in kept:
            discarded = folder.with_name(f"{_UNFINISHED}discarded-{folder.name}")
            folder.rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)


def _describe(folder: Path, state: dict[str, Any]) -> None:
    """Flush every file to disk and write trainer_state.json."""
    files = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    write_atomically(folder / TRAINER_STATE, json.dumps(state | {"files": files}, indent=1))
    for subfolder in [folder, *(f for f in folder.rglob("*") if f.is_dir())]:
        flush_folder(subfolder)


def _replace(unfinished: Path, final: Path) -> None:
    if final.exists():  # a damaged checkpoint of the same step, which this run did not continue
        discarded = final.with_name(f"{_UNFINISHED}discarded-{final.name}")
        final.rename(discarded)
        os.replace(unfinished, final)
        shutil.rmtree(discarded, ignore_errors=True)
    else:
        os.replace(unfinished, final)
    flush_folder(final.parent)


def _explain_failure(final: Path, error: Exception) -> str:
    try:
        parent = next(folder for folder in final.parents if folder.exists())
        free = f"{shutil.disk_usage(parent).free / 2**20:,.0f} MiB are free there"
    except OSError:
        free = "the free space is unknown"
    earlier = [folder.name for folder in list_checkpoints(final.parent.parent) if folder != final]
    survivor = f"the checkpoint before, {earlier[-1]}, is untouched" if earlier else "there is no earlier checkpoint"
    return (
        f"could not write the checkpoint {final}: {error}. {free}; {survivor}. Free some space, make the folder "
        "writable or lower train.keep_checkpoints, then give the same command again to continue"
    )
