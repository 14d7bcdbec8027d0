"""Build what a run needs, cheapest first: what the configuration alone can refuse fails before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deepspec.config import ConfigError, TrainRun
from deepspec.data.dataset import ConversationDataset, check_vocabulary, tokenize_conversations
from deepspec.data.mask_token import find_mask_token
from deepspec.data.rendering import Rendering, differences_of_answers, template_name
from deepspec.drafts import DraftModel, DraftSettings, build_draft, build_draft_config, engine_limits, load_draft
from deepspec.features import CachedFeatures, CachedRendering, FeatureSource, OnlineFeatures
from deepspec.features.served import connect_served
from deepspec.features.vllm import connect_vllm
from deepspec.ranks import ranks_on_this_machine
from deepspec.targets import (
    Target,
    TargetHead,
    adapter_for,
    describe_head,
    describe_target,
    dtype_name,
    load_target,
    load_target_config,
    load_target_head,
    load_tokenizer,
    position_range,
)
from deepspec.targets.positions import check_positions
from deepspec.training.resume import check_same_target
from deepspec.training.vocabulary import most_used_tokens
from deepspec.training.warm_start import check_settings, filled_in, started_from

logger = logging.getLogger(__name__)

CONNECT: dict[str, Callable[..., FeatureSource]] = {
    "served": connect_served,
    "vllm": connect_vllm,
}  # features.source of another process


@dataclass(frozen=True)
class Materials:
    """Everything that is trained or trained on."""

    draft: DraftModel
    features: FeatureSource
    train_set: ConversationDataset
    eval_set: ConversationDataset | None
    pad_id: int
    target_dtype: torch.dtype
    target_head: torch.Tensor | None  # [vocab, hidden], where the draft has a part of it
    target_summary: str  # what of the target is in memory, in a line


def prepare_materials(
    config: TrainRun,
    accelerator: Accelerator,
    checkpoint: Path | None,
    check_target: Callable[[Target], None] | None = None,
) -> Materials:
    """Load target and data, and build the draft: fresh, from `train.start_from`, or from `checkpoint`.

    Args:
        check_target: see `train`.

    Raises:
        ConfigError: a draft that cannot be built for this target, or does not fit that of `train.start_from`; a
            checkpoint of a run with another target; a tokenizer without the tokens it needs, or a feature server that
            does not serve this target.
        ValueError: a tokenizer that does not belong to the target, or a checkpoint of another target.
        DataError: unusable data, or a feature cache that does not fit the run.
    """
    target_config = load_target_config(config.target.path, config.target.revision, config.target.gguf_file)
    tokenizer = load_tokenizer(
        config.target.path,
        revision=config.target.revision,
        gguf_file=config.target.gguf_file,
        chat_template=config.data.chat_template,
    )
    check_vocabulary(tokenizer, target_config.vocab_size, config.target.path)
    check_positions(target_config, config.data.max_length, "data.max_length")
    draft_config = draft_config_of(config, target_config, tokenizer)
    if accelerator.is_main_process and (limits := engine_limits(draft_config)):
        logger.warning("engines cannot serve this draft as it is trained: %s", "; ".join(limits))
    if config.train.start_from is not None:
        check_settings(draft_config, config.train.start_from)
    rendering = Rendering.of(tokenizer, config.data)
    if accelerator.is_main_process:
        for difference in differences_of_answers(config.data.train_files, rendering):
            logger.warning("%s; the draft would learn on other prompts than the target answered", difference)
    with accelerator.main_process_first():
        train_set, eval_set = load_datasets(config, tokenizer)
    if accelerator.is_main_process:
        _note_length(config, position_range(target_config), train_set)
    target = _load_target(config, accelerator)
    if check_target is not None and isinstance(target, Target):
        check_target(target)
    draft_config.target_fingerprint = target.fingerprint
    draft_config.target_gguf_file = config.target.gguf_file
    rendering.record_in(draft_config)
    if checkpoint is None:
        draft = _new_draft(config, draft_config, target, train_set, tokenizer)
    else:
        draft = _continued_draft(checkpoint, draft_config, target)
    features = _feature_source(config, target, draft_config, tokenizer, accelerator.device)
    if isinstance(features, CachedFeatures):
        for dataset in filter(None, (train_set, eval_set)):
            features.check_documents(dataset)
    return Materials(
        draft=draft.train(),
        features=features,
        train_set=train_set,
        eval_set=eval_set,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        target_dtype=target.dtype,
        target_head=target.head_weight.detach() if draft.is_pruned else None,
        target_summary=describe_target(target) if isinstance(target, Target) else describe_head(target),
    )


def _note_length(config: TrainRun, positions: int, train_set: ConversationDataset) -> None:
    """Say so if samples may be longer than the target can read."""
    if config.data.max_length > positions:
        longer = int((train_set.lengths() > positions).sum())
        logger.warning(
            "data.max_length=%d, but target %s reads %d positions: its features beyond them mean little, and %d of %d "
            "samples are longer; set data.max_length=%d",
            config.data.max_length,
            config.target.path,
            positions,
            longer,
            len(train_set),
            positions,
        )


def _new_draft(
    config: TrainRun,
    draft_config: PreTrainedConfig,
    target: Target | TargetHead,
    train_set: ConversationDataset,
    tokenizer: PreTrainedTokenizerBase,
) -> DraftModel:
    if config.train.start_from is not None:
        return started_from(config.train.start_from, draft_config, target, config.seed)
    kept, size = None, DraftSettings.of(draft_config).draft_vocab_size
    if size is not None:
        kept = most_used_tokens(train_set, tokenizer, draft_config.vocab_size, size)
    draft = build_draft(draft_config, target, seed=config.seed, kept_tokens=kept)
    if config.draft.start_from_target:
        draft.start_from_target(target)
    return draft


def _continued_draft(checkpoint: Path, draft_config: PreTrainedConfig, target: Target | TargetHead) -> DraftModel:
    """That of the checkpoint, for the same target, which may lie elsewhere by now."""
    check_same_target(checkpoint, target.fingerprint)
    draft = _in_aligned_memory(load_draft(checkpoint, dtype=torch.float32, target=target))
    draft.config.target_model_name_or_path = draft_config.target_model_name_or_path
    draft.config.target_revision = draft_config.target_revision
    return draft


def _load_target(config: TrainRun, accelerator: Accelerator) -> Target | TargetHead:
    """The target; where its features come from elsewhere, no more of it than draft and source take from it."""
    wanted = config.target
    if config.features.source != "online":
        return load_target_head(wanted.path, revision=wanted.revision, gguf_file=wanted.gguf_file, dtype=wanted.dtype)
    if wanted.device_map is not None and accelerator.num_processes > 1:
        raise ConfigError(
            f"target.device_map={wanted.device_map}: each of the {accelerator.num_processes} ranks would spread a "
            "target of its own over the GPUs; train with one process, or serve the target (features.source=served, "
            f"python -m deepspec.features.serve target={wanted.path} device_map={wanted.device_map})"
        )
    return load_target(
        wanted.path,
        revision=wanted.revision,
        gguf_file=wanted.gguf_file,
        dtype=wanted.dtype,
        device=target_device(config.features.target_device, accelerator),
        device_map=wanted.device_map,
    )


def _feature_source(
    config: TrainRun,
    target: Target | TargetHead,
    draft_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> FeatureSource:
    layer_ids = DraftSettings.of(draft_config).target_layer_ids
    if isinstance(target, Target):
        return OnlineFeatures(target, layer_ids, device)
    if config.features.source in CONNECT:
        connect = CONNECT[config.features.source]
        return connect(config.features, target, layer_ids, device=device, max_length=config.data.max_length)
    return CachedFeatures(
        config.features.cache_dir,
        target_fingerprint=target.fingerprint,
        target_dtype=dtype_name(target.dtype),
        layer_ids=layer_ids,
        rendering=CachedRendering.of(tokenizer, config.data),
        device=device,
    )


def target_device(name: str, accelerator: Accelerator) -> torch.device:
    """Where the online target lives, see `features.target_device`.

    Raises:
        ConfigError: no such device.
    """
    if name == "same":
        return accelerator.device
    try:
        device = torch.device(
            f"cuda:{accelerator.local_process_index + ranks_on_this_machine()}" if name == "own" else name
        )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"features.target_device={name}: cannot be used by local rank {accelerator.local_process_index} "
            f"({str(error).splitlines()[0]}); must be same, own (needs one more visible GPU per rank) or a device such "
            "as cuda:1 or cpu"
        ) from error
    return device


def draft_config_of(
    config: TrainRun, target_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The draft that `config.draft` describes, for this target.

    Raises:
        ConfigError: a value that cannot work.
    """
    draft, adapter = filled_in(config.draft, config.train.start_from), adapter_for(target_config)
    mask_token_id = draft.mask_token_id
    if mask_token_id is None and draft.algorithm != "eagle3":
        mask_token_id = find_mask_token(tokenizer, target_config.get_text_config().vocab_size)
    return build_draft_config(
        target_config,
        algorithm=draft.algorithm,
        num_layers=draft.num_layers,
        block_size=draft.block_size,
        sample_from_anchor=draft.sample_from_anchor,
        target_layer_ids=draft.target_layer_ids,
        mask_token_id=mask_token_id,
        markov_rank=draft.markov_rank,
        markov_head_type=draft.markov_head_type,
        confidence_head=draft.confidence_head,
        confidence_head_with_markov=draft.confidence_head_with_markov,
        num_anchors=config.train.num_anchors,
        architecture=draft.architecture,
        num_heads=draft.num_heads,
        num_kv_heads=draft.num_kv_heads,
        head_dim=draft.head_dim,
        intermediate_size=draft.intermediate_size,
        sliding_window=draft.sliding_window,
        ttt_length=draft.ttt_length,
        step_loss_decay=config.train.loss.step_decay,
        draft_vocab_size=draft.vocab_size,
        embedding_scale=adapter.embedding_scale(target_config),
        logit_scale=adapter.logit_scale(target_config),
        final_logit_softcapping=adapter.final_logit_softcapping(target_config),
        target_model_name_or_path=config.target.path,
        target_revision=config.target.revision,
    )


def _in_aligned_memory(draft: DraftModel) -> DraftModel:
    """Move the weights out of the mapped file. On CPUs the last bit of a matrix product depends on the alignment of its
    inputs, and a resumed run has to repeat those of an uninterrupted one."""
    for parameter in draft.parameters():
        parameter.data = parameter.data.clone()
    return draft


def load_datasets(
    config: TrainRun, tokenizer: PreTrainedTokenizerBase
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """What is trained on, and what is measured during training.

    Raises:
        DataError: unusable data.
    """
    train_set = _dataset(config, config.data.train_files, tokenizer)
    if not config.data.eval_files:
        return train_set, None
    return train_set, _dataset(config, config.data.eval_files, tokenizer).first(config.data.eval_samples)


def _dataset(config: TrainRun, files: list[str], tokenizer: PreTrainedTokenizerBase) -> ConversationDataset:
    return tokenize_conversations(
        files,
        tokenizer,
        max_length=config.data.max_length,
        min_supervised_tokens=config.data.min_supervised_tokens,
        template_options=config.data.template_options,
        system_prompt=config.data.system_prompt,
        template_name=template_name(config.data, config.target),
        on_bad_row=config.data.on_bad_row,
    )
