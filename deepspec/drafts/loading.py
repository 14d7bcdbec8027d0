"""Load a trained draft from a folder, a training run or the Hub, with every check before a weight is used."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from deepspec.checkpoints import DRAFT, newest_checkpoint
from deepspec.config import ConfigError
from deepspec.drafts.base import LENT, DraftModel, TargetWeights
from deepspec.drafts.building import draft_class, expected_shapes, shape_problems
from deepspec.drafts.configuration import DraftSettings, known_architectures, uniform_layers
from deepspec.files import download_model, weight_files
from deepspec.text import some

logger = logging.getLogger(__name__)

SEPARATE_MASK = "mask_embedding.pt"  # a mask token's embedding of its own, pickled


class LoadedTarget(TargetWeights, Protocol):
    """What loading checks a draft against; `deepspec.targets.Target` has it."""

    @property
    def name_or_path(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


def load_draft(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    target: LoadedTarget | None = None,
    allow_other_target: bool = False,
) -> DraftModel:
    """Load a draft for decoding or for further training.

    Args:
        path: a draft folder, a checkpoint folder, a training run (its newest complete checkpoint), or a Hub id.
        revision: Hub branch, tag or commit.
        dtype: of the weights in memory; None = as stored.
        target: if given, the draft must have been trained for it. Lends its embedding and head where the files hold
            none, as those of z-lab.
        allow_other_target: one of other weights but the same shape will do, for example a fine-tuned one.

    Raises:
        FileNotFoundError: nothing there, or a weight file is missing.
        ValueError: not a draft; a damaged file; tensors missing, unknown or of a wrong shape; another target.
    """
    folder = find_draft_folder(path, revision)
    draft: Any = read_draft(folder, dtype=dtype, lender=target)
    draft = draft.to(device)
    if target is not None:
        check_target(draft, target, folder, allow_other_target=allow_other_target)
    return draft


def read_draft(folder: Path, *, dtype: torch.dtype | None = None, lender: TargetWeights | None = None) -> DraftModel:
    """`load_draft` of a folder, on the CPU, for whatever target it was trained.

    Args:
        lender: whose embedding and head it gets where its files hold none.
    """
    config = read_draft_config(folder)
    lacking = _check_tensors(folder, config)
    if (folder / SEPARATE_MASK).is_file():
        raise ValueError(f"{folder / SEPARATE_MASK}: DeepSpec has no draft with an embedding beside the target's")
    if lacking and lender is None:
        raise ValueError(
            f"{folder}: {some(list(lacking))} not in its files, being the target's: load it with the target, "
            "load_draft(..., target=...)"
        )
    load = partial(draft_class(config).from_pretrained, config=config, dtype=dtype or "auto")
    if lacking:
        weights = {name: weight for file in weight_files(folder) for name, weight in load_file(file).items()}
        draft = load(None, state_dict=weights | {name: torch.zeros(shape) for name, shape in lacking.items()})
    else:
        draft = load(folder)
    try:
        draft.check_vocabulary()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if lender is not None:
        draft.tie_to_target(lender, lacking)
    return draft.eval()


def find_draft_folder(path: str | Path, revision: str | None = None, key: str = "checkpoint") -> Path:
    """The folder with the draft's config.json; downloads it when `path` is a Hub id.

    Args:
        key: of the configuration that names the draft, for the messages.

    Raises:
        FileNotFoundError: nothing there.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        return _download(str(path), revision, key)
    for candidate in (folder, folder / DRAFT):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest / DRAFT
        raise FileNotFoundError(f"{key}={path}: no complete checkpoint in {folder / 'checkpoints'}")
    raise FileNotFoundError(
        f"{key}={path}: neither config.json nor checkpoints there; give a draft folder, a run folder or a Hub id"
    )


def _download(repo: str, revision: str | None, key: str) -> Path:
    if repo.startswith(("/", ".", "~")) or repo.count("/") != 1:
        raise FileNotFoundError(f"{key}={repo}: no such folder")
    return download_model(repo, revision, key)


def read_draft_config(folder: Path) -> PreTrainedConfig:
    """The draft's config.

    Raises:
        ValueError: damaged, or not the config of a draft.
    """
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        config = AutoConfig.from_pretrained(folder)
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: not a readable config: {error}") from error
    try:
        known = known_architectures(config)
        config = uniform_layers(config)
        if not set(known) & set(architectures):
            raise ConfigError(f"architectures={architectures}: expected {' or '.join(known)}")
        DraftSettings.of(config)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    return config


def check_target(
    draft: DraftModel, target: LoadedTarget, source: Path | str = "this draft", *, allow_other_target: bool = False
) -> None:
    """Refuse a target that the draft was not trained for.

    A draft that records no fingerprint (published elsewhere) is compared by shape, and a different embedding is logged.

    Args:
        allow_other_target: other weights of the same shape are logged, not refused.

    Raises:
        ConfigError: another target.
    """
    recorded = getattr(draft.config, "target_fingerprint", None)
    trained_for = getattr(draft.config, "target_model_name_or_path", None)
    if draft.embed_tokens.weight.shape != target.embedding_weight.shape:
        raise ConfigError(
            f"{source}: its embedding is {list(draft.embed_tokens.weight.shape)} [vocab, hidden], but that of target "
            f"{target.name_or_path} is {list(target.embedding_weight.shape)}; it was trained for "
            f"{trained_for or 'another target'}"
        )
    if recorded is not None and recorded != target.fingerprint:
        difference = (
            f"{source}: trained for target {trained_for} with fingerprint {recorded[:12]}, but the fingerprint of "
            f"{target.name_or_path} is {target.fingerprint[:12]}"
        )
        if not allow_other_target:
            raise ConfigError(
                f"{difference}; load the target it was trained for, or measure it on this one on purpose with "
                "eval.allow_other_target=true"
            )
        logger.warning("%s: fewer drafted tokens may be accepted", difference)
    if recorded is None and not _same_weights(draft.embed_tokens.weight, target.embedding_weight):
        logger.warning(
            "%s records no target and its embedding differs from that of %s: few drafted tokens may be accepted",
            source,
            target.name_or_path,
        )


def _same_weights(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to the coarser of the two number formats."""
    return torch.allclose(ours.detach().bfloat16().cpu(), theirs.detach().bfloat16().cpu(), rtol=2**-7)


def _check_tensors(folder: Path, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Compare names and shapes in the files with what the config needs. Reads headers, no weights.

    Returns:
        The shapes of what is not there of the target's own weights.
    """
    expected = expected_shapes(config)
    stored: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged or incomplete ({error}); copy or download it again") from error
    if problems := shape_problems(stored, expected, optional=LENT):
        raise ValueError(f"{folder}: {problems[0]}")
    return {name: expected[name] for name in LENT if name not in stored}
