"""`export` and `import`: a draft from one checkpoint format to another, tensor by tensor, without building a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspec.config import ConfigError
from deepspec.decoding.sps import SPS_FILE
from deepspec.drafts.engines import DraftKind
from deepspec.drafts.loading import SEPARATE_MASK, find_draft_folder
from deepspec.drafts.vocabulary import DraftVocabulary
from deepspec.publishing.errors import WRONG_FIELDS, DamagedDraftError, PublishError, wrong_field
from deepspec.publishing.formats import FORMATS, DraftFolder, Format, Verifier, find_format, format_named
from deepspec.publishing.formats.base import EMBEDDING_AND_HEAD, Config
from deepspec.publishing.layout import (
    DRAFT_TO_TARGET,
    EMBEDDING,
    HEAD,
    TARGET_TO_DRAFT,
    shapes_of_fields,
    tensor_problems,
)
from deepspec.publishing.reading import read_folder
from deepspec.publishing.tables import read_tables, write_tables
from deepspec.publishing.weights import TORCH_DTYPES, AnyTensor, HeldTensor, write_tensors
from deepspec.publishing.whole_folder import written_whole
from deepspec.targets import BUILTIN_WEIGHTS, load_target_config, load_target_head

BUILTIN = "builtin"


@dataclass(frozen=True)
class TargetChoice:
    """The target that a user names."""

    path: str | None
    revision: str | None = None
    gguf_file: str | None = None


@dataclass
class ExportOptions:
    """Write a draft in the layout that an engine reads."""

    checkpoint: str = "???"  # training run (its newest checkpoint), checkpoint or draft folder, of any format
    format: str = "???"  # deepspec, speculators, zlab, sglang, eagle3 or transformers
    output_dir: str = "???"  # new or empty
    target: str | None = None  # folder or Hub id of the target; null = as the draft records it
    target_revision: str | None = None  # Hub branch, tag or commit
    target_gguf_file: str | None = None  # the GGUF file there that holds the target


@dataclass
class ImportOptions:
    """Write a draft of any format in DeepSpec's own layout."""

    path: str = "???"  # folder or Hub id of the draft; its format is found
    output_dir: str = "???"  # new or empty
    target: str | None = None  # needed where the draft has no embedding and head of its own
    target_revision: str | None = None  # Hub branch, tag or commit
    target_gguf_file: str | None = None  # the GGUF file there that holds the target


@dataclass(frozen=True)
class OpenedDraft:
    """A draft of any format, read into our own layout. Embedding and head may be missing."""

    folder: DraftFolder
    format: Format
    config: Config
    kind: DraftKind
    tensors: dict[str, AnyTensor]  # our names


def export_draft(options: ExportOptions) -> Path:
    """Returns the written folder.

    Raises:
        ConfigError: no such format.
        FileNotFoundError: no such draft or target.
        PublishError: the format cannot hold it, something is missing or damaged, or the folder holds other things.
    """
    chosen = format_named(options.format)
    draft = open_draft(find_draft_folder(options.checkpoint))
    target = TargetChoice(options.target, options.target_revision, options.target_gguf_file)
    return _convert(draft, chosen, Path(options.output_dir), target)


def import_draft(options: ImportOptions) -> Path:
    """Returns the written folder. Raises: see `export_draft`."""
    path = Path(options.path).expanduser()
    target = TargetChoice(options.target, options.target_revision, options.target_gguf_file)
    draft = open_draft(path if path.exists() else find_draft_folder(options.path, key="path"), _known_of(target))
    return _convert(draft, FORMATS["deepspec"], Path(options.output_dir), target)


def _convert(draft: OpenedDraft, chosen: Format, output: Path, target: TargetChoice) -> Path:
    with written_whole(output) as folder:
        write_draft(draft, chosen, folder, target)
    print(f"{output}: {draft.kind.algorithm} draft in the {chosen.name} format ({chosen.description})")
    print(f"what each engine would do with it: python -m deepspec.publishing check path={output}")
    return output


def _known_of(target: TargetChoice) -> Config:
    if target.path is None:
        return {}
    config = load_target_config(target.path, target.revision, target.gguf_file)
    return {"num_target_layers": config.num_hidden_layers}


def open_draft(path: Path, known: Config | None = None) -> OpenedDraft:
    """Read a draft folder of any format.

    Args:
        known: fields of the config where the folder's own has none.

    Raises:
        FileNotFoundError, PublishError: see `read_folder`, `find_format`, `Format.from_config`; or tensors do not fit.
    """
    folder = read_folder(path)
    its_format = find_format(folder)
    try:
        config = its_format.from_config((known or {}) | folder.config)
        kind = _kind_of(config)
        expected = shapes_of_fields(config)
        ours = {theirs: name for name, theirs in its_format.renamed.items()}
        tensors = {ours.get(name, name): tensor for name, tensor in folder.tensors.items()}
        tensors = _with_vocabulary(kind, tensors)
        if problems := tensor_problems(tensors, expected, its_format.optional):
            raise DamagedDraftError("; ".join(problems))
        if kind.is_pruned:
            _check_vocabulary(kind, tensors)
    except PublishError as error:
        raise type(error)(f"{path} ({its_format.name} format): {error}") from error
    except WRONG_FIELDS as error:
        raise DamagedDraftError(f"{path / 'config.json'}: {wrong_field(error)}") from error
    return OpenedDraft(folder, its_format, config, kind, tensors)


def _kind_of(config: Config) -> DraftKind:
    try:
        return DraftKind.of_fields(config)
    except ConfigError as error:
        raise DamagedDraftError(f"config.json: {error}") from error


def _with_vocabulary(kind: DraftKind, tensors: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Some store the mapping of a whole vocabulary too, and some no `t2d`, which follows from `d2t`."""
    stored = tensors.get(DRAFT_TO_TARGET)
    if stored is None or stored.dtype != "I64":
        return tensors
    offsets = stored.load()
    if not kind.is_pruned and not offsets.any():
        return {name: t for name, t in tensors.items() if name not in (DRAFT_TO_TARGET, TARGET_TO_DRAFT)}
    if kind.is_pruned and TARGET_TO_DRAFT not in tensors:
        words = (offsets + torch.arange(len(offsets))).clamp(0, kind.vocab_size - 1)
        kept = torch.zeros(kind.vocab_size, dtype=torch.bool).index_fill_(0, words, True)
        return tensors | {TARGET_TO_DRAFT: HeldTensor(kept)}
    return tensors


def _check_vocabulary(kind: DraftKind, tensors: Mapping[str, AnyTensor]) -> None:
    """Raises DamagedDraftError where `d2t` and `t2d` do not say the same, or `d2t` holds ids instead of offsets."""
    vocabulary = DraftVocabulary()
    vocabulary.make_vocabulary(kind.vocab_size, kind.head_rows)
    vocabulary.d2t.copy_(tensors[DRAFT_TO_TARGET].load())
    vocabulary.t2d.copy_(tensors[TARGET_TO_DRAFT].load())
    try:
        vocabulary.check_vocabulary()
    except ValueError as error:
        raise DamagedDraftError(str(error)) from error


def write_draft(
    draft: OpenedDraft, chosen: Format, output: Path, target: TargetChoice, *, with_sps: bool = True
) -> None:
    """Write a draft into an empty folder, in a format.

    Args:
        with_sps: write the SPS table too, which is of one machine.

    Raises:
        PublishError: the format cannot hold it, or something that it needs is missing.
    """
    if (draft.folder.path / SEPARATE_MASK).is_file():
        raise PublishError(
            f"{draft.folder.path / SEPARATE_MASK}: DeepSpec has no draft with an embedding beside the target's"
        )
    if limits := chosen.limits(draft.kind):
        raise PublishError(f"format={chosen.name} {'; and it '.join(limits)}")
    config, tensors = draft.config, dict(draft.tensors)
    needed = EMBEDDING_AND_HEAD if draft.kind.is_pruned else chosen.needed
    if missing := needed - chosen.left_out - tensors.keys():
        config, taken = _from_target(draft, missing, target)
        tensors = taken | tensors
    verifier = _verifier(draft, target) if chosen.names_verifier else None
    written = {chosen.renamed.get(name, name): t for name, t in tensors.items() if name not in chosen.left_out}
    (output / "config.json").write_text(
        json.dumps(chosen.to_config(config, verifier), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    write_tensors(output, written)
    tables = read_tables(draft.folder.path, draft.format.tables)
    if not with_sps:
        tables.pop(SPS_FILE, None)
    write_tables(output, tables, chosen.tables)


def _from_target(
    draft: OpenedDraft, missing: Iterable[str], target: TargetChoice
) -> tuple[Config, dict[str, AnyTensor]]:
    """Embedding and head from the target, in the number format of the draft; and the config, which now records it."""
    config, recorded = draft.config, draft.config.get("target_model_name_or_path")
    what = " and ".join(sorted(missing))
    if target.path is None:
        known = f"; it was trained for {recorded}" if recorded else ""
        raise PublishError(f"{draft.folder.path}: has no {what}, its target does: give target=FOLDER or Hub id{known}")
    if HEAD in missing and draft.kind.is_pruned:
        raise PublishError(f"{draft.folder.path}: has a pruned vocabulary and no {HEAD}; no target can give that")
    dtype = TORCH_DTYPES.get(draft.tensors["fc.weight"].dtype, torch.float32)
    head = load_target_head(target.path, revision=target.revision, gguf_file=target.gguf_file, dtype=dtype)
    fingerprint = config.get("target_fingerprint")
    if fingerprint not in (None, head.fingerprint):
        raise PublishError(
            f"target={target.path}: its fingerprint is {head.fingerprint[:12]}, and the draft was trained for "
            f"{recorded} with {str(fingerprint)[:12]}"
        )
    weights = {EMBEDDING: head.embedding_weight, HEAD: head.head_weight}
    expected = shapes_of_fields(config)
    for name in missing:
        if tuple(weights[name].shape) != expected[name]:
            raise PublishError(
                f"target={target.path}: its {name} is {list(weights[name].shape)}, the draft needs {[*expected[name]]}"
            )
    found = {"target_model_name_or_path": target.path, "num_target_layers": head.num_layers}
    found = {name: value for name, value in found.items() if not config.get(name)}
    found["target_fingerprint"] = head.fingerprint
    if "target_model_name_or_path" in found:
        found |= {"target_revision": target.revision, "target_gguf_file": target.gguf_file}
    return config | found, {name: HeldTensor(weights[name].detach()) for name in sorted(missing)}


def _verifier(draft: OpenedDraft, target: TargetChoice) -> Verifier:
    """The target as other packages find it.

    Raises:
        PublishError: there is none that they could load.
    """
    name = target.path or draft.config.get("target_model_name_or_path")
    gguf_file = target.gguf_file or (draft.config.get("target_gguf_file") if target.path is None else None)
    if not name:
        raise PublishError(f"{draft.folder.path}: does not name its target, and the format must: give target=")
    if gguf_file:
        raise PublishError(
            f"the target is the GGUF file {gguf_file}, which readers of the format cannot load; give the unquantised "
            "model with target="
        )
    if name == BUILTIN:
        if target.path is None:
            raise PublishError(
                "the target is the built-in one, which only DeepSpec finds by that name; give target=builtin to name "
                "the folder where it lies on this machine"
            )
        name = str(BUILTIN_WEIGHTS)
    place = Path(name).expanduser()
    if not place.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") != 1:
            raise PublishError(f"target {name}: no such folder; give its folder or Hub id with target=")
        return Verifier(name, [])
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        sizes = config.get("text_config", config)
        for size in ("hidden_size", "vocab_size"):
            if sizes.get(size, draft.config[size]) != draft.config[size]:
                raise PublishError(f"target={name}: its {size} is {sizes[size]}, the draft's {draft.config[size]}")
        return Verifier(str(place), list(config.get("architectures") or []))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PublishError(f"target {name}: no readable config.json there ({error})") from error
