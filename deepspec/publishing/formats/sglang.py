"""What SGLang loads: our layout, with calibration and SPS table in SGLang's own files."""

from __future__ import annotations

from deepspec.drafts.configuration import QWEN3
from deepspec.drafts.eagle3_configuration import EAGLE3
from deepspec.drafts.engines import DraftKind, sglang_limits
from deepspec.publishing.errors import PublishError
from deepspec.publishing.formats.base import (
    Config,
    DraftFolder,
    Format,
    Verifier,
    complete,
    raise_nested,
    refuse_causal,
    with_window,
)
from deepspec.publishing.formats.own import DeepSpecFormat
from deepspec.publishing.tables import SGLANG_TABLES

OWN = DeepSpecFormat()
NESTED = ("dflash_config", "dspark_config")
SAME_AS_QWEN3 = ("DSparkDraftModel", "LingDSparkModel")


class SGLangFormat(Format):
    """Holds what SGLang can serve: DSpark of all head types, and DFlash in the fill-in convention.

    SGLang takes embedding and head from the target; they are kept so that our loader and vLLM read the folder too.
    """

    name = "sglang"
    description = "our layout with the files of SGLang's scheduler: dspark_sts.json, dspark_sps.json"
    tables = SGLANG_TABLES

    def recognises(self, folder: DraftFolder) -> bool:
        config = folder.config
        is_dspark = bool({QWEN3, *SAME_AS_QWEN3} & set(folder.architectures)) and config.get("model_type") == "qwen3"
        is_nested = "block_size" not in config or bool(set(SAME_AS_QWEN3) & set(folder.architectures))
        return SGLANG_TABLES.any_in(folder.path) or (is_dspark and is_nested)

    def limits(self, kind: DraftKind) -> list[str]:
        if kind.algorithm == EAGLE3:
            return ["holds DSpark and DFlash; SGLang reads Eagle3 of Llama shape with format=eagle3"]
        return [f"is for SGLang, which {limit}" for limit in sglang_limits(kind)]

    def to_config(self, config: Config, verifier: Verifier | None) -> Config:
        kind = DraftKind.of_fields(config)
        fields = config | {"sample_from_anchor": kind.sample_from_anchor}
        return fields | {"markov_head_type": kind.markov_head_type} if kind.markov_rank else fields

    def from_config(self, config: Config) -> Config:
        if not set(SAME_AS_QWEN3) & set(config.get("architectures") or []) and "block_size" in config:
            return OWN.from_config(config)
        fields = complete(raise_nested(config, *NESTED), "config.json")
        if missing := [key for key in ("block_size", "mask_token_id", "target_layer_ids") if fields.get(key) is None]:
            raise PublishError(f"config.json and {', '.join(NESTED)}: {', '.join(missing)} missing")
        refuse_causal(fields, is_causal=config.get("is_causal", (config.get("dflash_config") or {}).get("causal")))
        for key in NESTED:
            fields.pop(key, None)
        return with_window(fields | {"architectures": [QWEN3]})
