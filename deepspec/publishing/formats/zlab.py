"""The layout of z-lab's DFlash drafts: `DFlashDraftModel`, fields in `dflash_config`, no embedding and head."""

from __future__ import annotations

from deepspec.drafts.configuration import DFLASH
from deepspec.drafts.engines import DraftKind
from deepspec.publishing.errors import PublishError
from deepspec.publishing.formats.base import (
    EMBEDDING_AND_HEAD,
    Config,
    DraftFolder,
    Format,
    Verifier,
    as_fill_in,
    complete,
    fill_in_limits,
    raise_nested,
    refuse_causal,
    with_window,
)
from deepspec.publishing.layout import EMBEDDING


class ZLabFormat(Format):
    """Holds DFlash in the fill-in convention. Readers of it ignore our own fields, so they stay at the top level."""

    name = "zlab"
    description = "z-lab's DFlash drafts: DFlashDraftModel, without embedding and head"
    left_out = EMBEDDING_AND_HEAD
    needed = frozenset()

    def recognises(self, folder: DraftFolder) -> bool:
        return DFLASH in folder.architectures and EMBEDDING not in folder.tensors

    def limits(self, kind: DraftKind) -> list[str]:
        return fill_in_limits(kind)

    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        return as_fill_in(config)

    def from_config(self, config: Config) -> Config:
        if raise_nested(config, "dflash_config").get("sample_from_anchor"):
            raise PublishError("sample_from_anchor=true in a DFlashDraftModel: no reader has such a draft")
        return fill_in_config(config)


def fill_in_config(config: Config) -> Config:
    """Our config of a DFlash draft whose fields are flat or nested in `dflash_config`.

    Raises:
        PublishError: DeepSpec has no such draft, or a field is missing.
    """
    fields = complete(raise_nested(config, "dflash_config"), "config.json")
    if missing := [key for key in ("block_size", "mask_token_id", "target_layer_ids") if fields.get(key) is None]:
        raise PublishError(f"config.json and its dflash_config: {', '.join(missing)} missing")
    nested = config.get("dflash_config") or {}
    refuse_causal(fields, is_causal=config.get("is_causal", nested.get("causal")))
    return with_window(as_fill_in(fields))
