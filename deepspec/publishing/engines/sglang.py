"""SGLang 0.5.23: `--speculative-algorithm` DSPARK, DFLASH or EAGLE3."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from deepspec.drafts.eagle3_configuration import EAGLE3
from deepspec.drafts.engines import DraftKind
from deepspec.publishing.convert import OpenedDraft
from deepspec.publishing.engines.base import (
    Engine,
    Finding,
    Serving,
    care,
    check_count,
    check_layer_ids,
    check_rope,
    check_window,
    fails,
    fine,
    slides,
)
from deepspec.publishing.errors import PublishError
from deepspec.publishing.formats import DraftFolder, Format, eagle3
from deepspec.publishing.formats.sglang import NESTED
from deepspec.publishing.tables import OUR_TABLES, SGLANG_TABLES, read_tables

ALGORITHMS = {"dspark": "DSPARK", "dflash": "DFLASH", EAGLE3: "EAGLE3"}
MOST_PROBABLE = "proposes the draft's most probable tokens at every temperature"
# Architectures of drafts that it has and DeepSpec does not, with the algorithm that they run under.
OTHER_DRAFTS = {
    "LlamaForCausalLMEagle3": "EAGLE3",
    "Eagle3DeepseekV2ForCausalLM": "EAGLE3",
    "DFlashDraftModel": "DFLASH",
    "DFlash2DraftModel": "DFLASH",
    "LiLiCorrDraftModel": "DFLASH",
    "Qwen3DSparkModel": "DSPARK",
    "DSparkDraftModel": "DSPARK",
}


class SGLang(Engine):
    name, title, version = "sglang", "SGLang", "0.5.23"
    formats = ("sglang", "deepspec", "zlab", "transformers", "eagle3")

    def unread(self, kind: DraftKind, its_format: Format) -> str | None:
        if kind.algorithm == EAGLE3 and its_format.name != "eagle3":
            return f"has no {kind.architecture}: export it with format=eagle3"
        return super().unread(kind, its_format)

    def traps(self, draft: OpenedDraft) -> Iterator[Finding]:
        folder, kind = draft.folder, draft.kind
        yield fine(f"--speculative-algorithm {ALGORITHMS[kind.algorithm]}, {kind.draft_length} tokens a round")
        if kind.algorithm == EAGLE3:
            yield from _check_eagle3(draft)
            return
        yield from _check_head_fields(draft)
        if slides(draft.config) and folder.config.get("is_causal") is not False:
            yield fails(
                'sliding layers are causal to it without "is_causal": false, whatever dflash_config says; write it'
            )
        else:
            yield fine("all slots of a block see each other")
        yield from check_layer_ids(draft, lowest=0)
        yield from check_rope(draft.config)
        yield from check_window(draft)
        yield fine("embedding and head are taken from the target")
        if kind.is_fill_in:
            yield care(MOST_PROBABLE)
        yield from _check_tables(draft)

    def examine_unknown(self, folder: DraftFolder) -> Iterator[Finding]:
        known = [name for name in folder.architectures if name in OTHER_DRAFTS]
        if "speculators_model_type" in folder.config:
            yield fails("does not read the speculators format of DSpark, DFlash and Eagle3")
        elif known:
            yield fine(f"{known[0]} runs under --speculative-algorithm {OTHER_DRAFTS[known[0]]}")
            yield care("DeepSpec does not know this draft, so names and shapes of its tensors were not compared")
        else:
            yield fails(f"has no draft class {', '.join(folder.architectures) or '(architectures missing)'}")

    def command(self, serving: Serving) -> str:
        words = ["python -m sglang.launch_server"]
        if serving.target_gguf_file:
            file = shlex.quote(f"{serving.target}/{serving.target_gguf_file}")
            words.append(f"--model-path {file} --load-format gguf --tokenizer-path {serving.target_word}")
        else:
            words.append(f"--model-path {serving.target_word}")
        if serving.target_revision:
            words.append(f"--revision {shlex.quote(serving.target_revision)}")
        draft = f"--speculative-draft-model-path {shlex.quote(serving.draft)}"
        if serving.draft_revision:
            draft += f" --speculative-draft-model-revision {shlex.quote(serving.draft_revision)}"
        kind = serving.kind
        return serving.in_shell(
            " ".join(words), f"--speculative-algorithm {ALGORITHMS[kind.algorithm]} {draft}", _length_flags(kind)
        )

    def features(self, serving: Serving) -> list[str]:
        if serving.kind.is_fill_in or serving.kind.algorithm == EAGLE3:
            return ["It proposes the draft's most probable tokens at every temperature."]
        if not serving.kind.confidence_head:
            return []
        scheduled = "`SGLANG_RAGGED_VERIFY_MODE=cap-accept` or `compact`"
        sentences = [f"The confidence head is used with {scheduled} only."]
        if serving.has_calibration and serving.format.name == self.name:
            file = SGLANG_TABLES.calibration.name
            sentences.append(f"With it, give the calibration too: `--speculative-dspark-confidence-sts-path {file}`.")
        elif serving.has_calibration:
            sentences.append("The calibration is not in SGLang's form here; `format=sglang` writes it so.")
        return sentences


def _length_flags(kind: DraftKind) -> str:
    if kind.algorithm == "dspark":
        return f"--speculative-dspark-block-size {kind.draft_length}"
    if kind.algorithm == "dflash":
        return f"--speculative-dflash-block-size {kind.draft_length + 1}"
    return (  # a chain, and the token that the target adds
        f"--speculative-num-steps {kind.draft_length} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {kind.draft_length + 1}"
    )


def _check_eagle3(draft: OpenedDraft) -> Iterator[Finding]:
    config, layers = draft.folder.config, list(draft.kind.target_layer_ids)
    if eagle3.ARCHITECTURE not in draft.folder.architectures:
        yield fails(f"has no {', '.join(draft.folder.architectures)}; write architectures [{eagle3.ARCHITECTURE}]")
    if "draft_vocab_size" not in config:
        yield fails(f"wants draft_vocab_size in config.json; write {draft.kind.head_rows}")
    if config.get("target_hidden_size", "") is None:
        yield fails("takes target_hidden_size null for a size; remove it from config.json")
    named = (config.get(eagle3.SECTION) or {}).get(eagle3.LAYERS)
    if not named and layers != eagle3.default_layers(draft.config.get("num_target_layers") or 0):
        yield fails(
            f"would capture three layers of its own choice: it reads {eagle3.SECTION}.{eagle3.LAYERS} alone, which is "
            f"missing; write {layers} there"
        )
    yield from check_count(config, draft)
    yield from check_layer_ids(draft, lowest=-1)
    yield from check_rope(draft.config)
    yield fine("the embedding is taken from the target")
    yield care(MOST_PROBABLE)


def _check_head_fields(draft: OpenedDraft) -> Iterator[Finding]:
    """It finds the head's type nested too, but the rank, when it builds the head, at the top level alone."""
    config = draft.folder.config
    places = [config, *(config.get(key) or {} for key in ("text_config", *NESTED))]
    if draft.kind.markov_rank and not any(place.get("markov_head_type") for place in places):
        yield fails(
            "markov_head_type is missing, which it wants with markov_rank above 0; export it with format=sglang"
        )
    if draft.kind.markov_rank and not config.get("markov_rank"):
        yield fails(
            "markov_rank is not at the top level of config.json; import the draft, then export it with format=sglang"
        )


def _check_tables(draft: OpenedDraft) -> Iterator[Finding]:
    try:
        records = read_tables(draft.folder.path, draft.format.tables)
    except PublishError as error:
        yield fails(str(error))
        return
    calibration = records.get(OUR_TABLES.calibration.name)
    if calibration is not None and len(calibration["temperatures"]) != draft.kind.draft_length:
        yield fails(
            f"the calibration has {len(calibration['temperatures'])} temperatures, the draft proposes "
            f"{draft.kind.draft_length} tokens; calibrate again"
        )
    for ours, theirs in zip(OUR_TABLES.files, SGLANG_TABLES.files, strict=True):
        if (draft.folder.path / theirs.name).is_file():
            yield fine(f"{theirs.name} is read")
        elif ours.name in records:
            yield care(f"{ours.name} is in our form; format=sglang writes {theirs.name}")
