"""Typed configuration: every key that a recipe or a command line may set, with its type, unit and meaning.

Hydra composes YAML against these dataclasses, so an unknown key or a wrong type is refused while composing. `validate`
then refuses impossible values. Both happen before any model is loaded. What needs the target's own config (layer ids,
head sizes) is checked by `deepspec.drafts.build_draft_config`, which reads no weights either.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the key, the value and what is allowed."""


def near_match(word: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the candidate nearest to `word`, or an empty string."""
    nearest = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""


@dataclass
class TargetConfig:
    path: str = "builtin"  # "builtin", a folder, or a Hub id of a Hugging Face causal language model
    revision: str | None = None  # Hub branch, tag or commit
    gguf_file: str | None = None  # name of a GGUF file in that folder or repository, which holds the model
    dtype: str = "auto"  # of the frozen target: auto (the checkpoint's own), float32, bfloat16, float16
    device_map: str | None = None  # spread over several GPUs: auto, balanced, balanced_low_0, sequential; null = on one


@dataclass
class DraftConfig:
    algorithm: str = "dspark"  # dspark (sequential and confidence heads), dflash (backbone alone) or eagle3
    architecture: str = "Qwen3DSparkModel"  # for every target; the others: docs/drafts.md
    num_layers: int = 5  # draft decoder layers
    num_heads: int | None = None  # attention heads; null = the target's where they fit (drafts/shapes.py)
    num_kv_heads: int | None = None  # key/value heads, a divisor of the heads; null likewise
    head_dim: int | None = None  # width of a head, even; null likewise
    intermediate_size: int | None = None  # width of the MLP; null = the target's, 3 * hidden size for narrow experts
    block_size: int = 7  # slots of a block, the anchor's among them; not of Eagle3
    sample_from_anchor: bool = True  # the anchor's slot predicts too: block_size tokens a round; false = one fewer
    ttt_length: int = 7  # Eagle3: steps of its training, and the most tokens drafted per round
    target_layer_ids: list[int] | None = (
        None  # captured target layers, 0-based, -1 = embedding output; null = spread evenly
    )
    mask_token_id: int | None = None  # token that fills the undrafted slots; null = one that text does not contain
    markov_rank: int = 256  # r of the sequential head; 0 = no sequential head
    markov_head_type: str = "vanilla"  # vanilla, gated or rnn
    confidence_head: bool = True  # predict whether each drafted token survives
    confidence_head_with_markov: bool = True  # the confidence head also reads the previous token's Markov embedding
    start_from_target: bool = False  # begin as the target's last layers and final norm; they must be like the draft's
    sliding_window: int | None = None  # a block sees only this many context tokens; null = all
    vocab_size: int | None = (
        None  # it proposes only this many tokens, those that the training data uses most; null = all
    )


@dataclass
class DataConfig:
    train_files: list[str] = field(
        default_factory=list
    )  # files, folders, patterns, hub:OWNER/NAME[:SPLIT]; docs/data.md
    eval_files: list[str] = field(default_factory=list)  # likewise; measured during training, never trained on
    eval_samples: int | None = 512  # the first that many samples of eval_files are measured; null = all
    max_length: int = 4096  # tokens; a longer sample is truncated (its count is reported)
    min_supervised_tokens: int = 14  # samples with fewer assistant tokens are dropped (and counted)
    chat_template: str | None = None  # a Jinja file in place of the tokenizer's own template
    template_options: dict[str, Any] = field(
        default_factory=dict
    )  # passed to the template, e.g. {enable_thinking: false}
    system_prompt: str | None = None  # goes before conversations that have no system message
    on_bad_row: str = "stop"  # a row that cannot be used: stop with its file and line, or skip and count it
    num_workers: int = 0  # data loader processes per rank


@dataclass
class FeaturesConfig:
    source: str = "online"  # online (resident target), cached (data_prep.cache), served (features.serve), vllm
    target_device: str = "same"  # online target: same GPU as the draft, own (behind the ranks' GPUs), or a device
    lookahead: int = 0  # micro-batches whose features are computed early, beside the training step; 0 = none
    urls: list[str] = field(default_factory=list)  # served, vllm: the servers, as http://host:port
    timeout: float = 60.0  # served, vllm: seconds for one request
    retry_for: float = 300.0  # served, vllm: seconds that a request is tried again before training stops
    dtype: str | None = None  # served: of the features on their way; null = target.dtype
    cache_dir: str = "outputs/cache/features"  # the folder that data_prep.cache writes and source=cached reads
    cache_dtype: str = "bfloat16"  # data_prep.cache: stored as float32, bfloat16, float8 (e4m3) or int8
    cache_shard_mib: float = 512  # data_prep.cache: about the size of a file, MiB
    cache_batch_tokens: int = 16384  # data_prep.cache: tokens in one pass of the target


@dataclass
class LossConfig:
    ce: float = 0.1  # weight of the cross-entropy
    tv: float = 0.9  # weight of the total variation between draft and target
    confidence: float = 1.0  # weight of the confidence head's binary cross-entropy
    decay: float = 4.0  # g in w_k = exp(-(k-1)/g); slots; not of Eagle3
    step_decay: float = 0.8  # Eagle3: w_k = step_decay^(k-1) of step k
    divisor: str = "supervised"  # divide by the supervised weights; published: by all tokens, prompts and padding too


@dataclass
class TrainConfig:
    epochs: float | None = 10.0  # passes over the data; counts where steps is null
    steps: int | None = None  # optimizer steps; on the command line, whichever of the two is named counts
    global_batch_size: int = 512  # samples per optimizer step, over all ranks and accumulation steps
    micro_batch_size: int | None = None  # samples per forward pass on one rank, padded to the longest; null = 1
    tokens_per_batch: int | None = None  # instead: samples packed into one row of at most this many tokens
    compile: bool = False  # torch.compile the draft's layers
    activation_checkpointing: bool = False  # compute a draft layer's activations again in the backward pass
    num_anchors: int = 512  # A: blocks per sample; Eagle3 trains at every position
    lr: float = 6e-4  # peak learning rate of AdamW
    weight_decay: float = 0.0
    warmup_ratio: float = 0.04  # fraction of all steps
    grad_clip: float = 1.0  # global gradient norm; 0 = no clipping
    mixed_precision: str = "no"  # no or bf16 (weights and gradients stay float32)
    save_steps: int = 500  # optimizer steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept
    eval_steps: int = 500  # optimizer steps between passes over data.eval_files
    resume: str = "auto"  # auto (newest valid checkpoint of output_dir, if any), never, or a checkpoint folder
    start_from: str | None = None  # a new run begins with this draft's weights: draft folder, run folder or Hub id
    collective_timeout: float = 60.0  # minutes that a rank waits for the others before it fails
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass
class DecodeConfig:
    max_new_tokens: int = 2048  # per prompt
    batch_size: int = 1  # prompts decoded together (slots)
    max_length: int | None = None  # prompt + new tokens that a slot can hold; null = as long as this run needs
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # tokens less likely than this share of the likeliest one are dropped; 0 = off
    repetition_penalty: float = 1.0  # divides the positive logits of tokens that were there before; 1 = off
    stop_strings: list[str] = field(default_factory=list)  # an answer ends with the token that completes one
    verification: str = "token"  # token or block
    policy: str = "fixed"  # how many drafted tokens are verified: fixed, threshold, prefix or asynchronous
    draft_tokens: int | None = None  # fixed: how many; null = the whole block
    confidence_threshold: float = 0.0  # threshold: only those before the first token whose confidence is below
    sps: str | None = None  # prefix, asynchronous: SPS table, a file or a shipped name; null = the one beside the draft


@dataclass
class EvalConfig:
    sets: list[str] = field(default_factory=list)  # names of JSONL files in prompts_dir, without the ending
    prompts_dir: str = "outputs/corpus/prompts"  # where the sets lie: one {"turns": [...], "system"?, "tools"?} a line
    first_turn_only: bool = False  # of prompts with several turns only the first is decoded, as published numbers are
    limit: int | None = 500  # prompts per set
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    allow_other_target: bool = False  # measure on a target of other weights than the draft was trained for
    baseline: bool = True  # also decode without a draft, interleaved, for the speed-up
    bootstrap_samples: int = 2000  # resamples of the 95% intervals


@dataclass
class WandbConfig:
    mode: str = "disabled"  # disabled, offline or online
    project: str = "deepspec"
    name: str | None = None  # run name; null = the name of output_dir
    entity: str | None = None


@dataclass
class LoggingConfig:
    log_steps: int = 10  # optimizer steps between log lines
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class TrainRun:
    """All of `train.py`."""

    target: TargetConfig = field(default_factory=TargetConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0  # data order, anchors, initial weights
    output_dir: str = "outputs/train"  # checkpoints, metrics.jsonl, resolved config


@dataclass
class CacheRun(TrainRun):
    """All of `data_prep.cache` and `data_prep.estimate`: a training run, and what to do about its feature cache."""

    force: bool = False  # write although the disk seems too small


@dataclass
class InspectRun(TrainRun):
    """All of `data_prep.inspect`: a training run, and what of its data to show."""

    samples: int = 3  # shown in full
    skip: int = 0  # samples before the first one shown
    plot: str = "outputs/inspect/lengths.png"  # where the histogram of lengths goes


@dataclass
class EvalRun:
    """All of `eval.py`."""

    checkpoint: str = "???"  # draft folder, run folder (its newest checkpoint) or Hub id
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0  # sampling; request i of a set draws from its own stream
    output_dir: str = "outputs/eval"  # metrics.json, rounds.jsonl, samples


CHOICES: dict[str, tuple[str, ...]] = {
    "target.dtype": ("auto", "float32", "bfloat16", "float16"),
    "target.device_map": ("auto", "balanced", "balanced_low_0", "sequential"),
    "draft.algorithm": ("dspark", "dflash", "eagle3"),
    "draft.architecture": ("Qwen3DSparkModel", "Gemma4DSparkModel", "Qwen3Eagle3Model", "LlamaEagle3Model"),
    "draft.markov_head_type": ("vanilla", "gated", "rnn"),
    "data.on_bad_row": ("stop", "skip"),
    "features.source": ("online", "cached", "served", "vllm"),
    "features.dtype": ("float32", "bfloat16", "float16"),
    "features.cache_dtype": ("float32", "bfloat16", "float8", "int8"),
    "train.mixed_precision": ("no", "bf16"),
    "train.loss.divisor": ("supervised", "published"),
    "decode.verification": ("token", "block"),
    "decode.policy": ("fixed", "threshold", "prefix", "asynchronous"),
    "logging.wandb.mode": ("disabled", "offline", "online"),
}

# (smallest, largest) allowed; None = unbounded.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "draft.num_layers": (1, None),
    "draft.num_heads": (1, None),
    "draft.num_kv_heads": (1, None),
    "draft.head_dim": (2, None),
    "draft.intermediate_size": (1, None),
    "draft.block_size": (1, 64),
    "draft.ttt_length": (1, 64),
    "draft.markov_rank": (0, None),
    "draft.sliding_window": (1, None),
    "draft.vocab_size": (1, None),
    "data.eval_samples": (1, None),
    "data.max_length": (2, None),
    "data.min_supervised_tokens": (0, None),
    "data.num_workers": (0, None),
    "features.lookahead": (0, 64),
    "features.timeout": (0.01, None),
    "features.retry_for": (0, None),
    "features.cache_shard_mib": (0.001, None),
    "features.cache_batch_tokens": (1, None),
    "train.epochs": (0, None),
    "train.steps": (1, None),
    "train.global_batch_size": (1, None),
    "train.micro_batch_size": (1, None),
    "train.tokens_per_batch": (2, None),
    "train.num_anchors": (1, None),
    "train.lr": (0, None),
    "train.weight_decay": (0, None),
    "train.warmup_ratio": (0, 1),
    "train.grad_clip": (0, None),
    "train.save_steps": (1, None),
    "train.keep_checkpoints": (1, None),
    "train.eval_steps": (1, None),
    "train.collective_timeout": (0.01, None),
    "train.loss.ce": (0, None),
    "train.loss.tv": (0, None),
    "train.loss.confidence": (0, None),
    "train.loss.decay": (1e-6, None),
    "train.loss.step_decay": (1e-6, 1),
    "decode.max_new_tokens": (1, None),
    "decode.batch_size": (1, None),
    "decode.max_length": (2, None),
    "decode.top_k": (0, None),
    "decode.top_p": (1e-6, 1),
    "decode.min_p": (0, 1),
    "decode.repetition_penalty": (0.01, 100),
    "decode.draft_tokens": (0, None),
    "decode.confidence_threshold": (0, 1),
    "eval.limit": (1, None),
    "eval.temperatures": (0, None),
    "eval.bootstrap_samples": (1, None),
    "samples": (0, None),
    "skip": (0, None),
    "logging.log_steps": (1, None),
    "seed": (0, None),
}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a (nested) config dataclass by its dotted key."""
    leaves: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{entry.name}.")
        else:
            leaves[f"{prefix}{entry.name}"] = value
    return leaves


def validate(config: TrainRun | EvalRun) -> None:
    """Refuse impossible values.

    Raises:
        ConfigError: with the key, its value and what is allowed.
    """
    leaves = flatten(config)
    for key, value in leaves.items():
        if key in CHOICES and value is not None and value not in CHOICES[key]:
            allowed = ", ".join(CHOICES[key])
            raise ConfigError(f"{key}={value}: must be one of {allowed}.{near_match(str(value), CHOICES[key])}")
        if key in RANGES:
            for number in value if isinstance(value, list) else [value]:
                _check_range(key, number)
    if isinstance(config, TrainRun):
        _validate_training(config)
    elif config.target.device_map is not None:
        raise ConfigError(
            f"target.device_map={config.target.device_map}: decoding keeps its caches on one device; set it to null "
            "and evaluate where one GPU holds the target"
        )
    elif "" in config.decode.stop_strings:
        raise ConfigError(f"decode.stop_strings={config.decode.stop_strings}: an empty string would end every answer")


def _check_range(key: str, number: float | None) -> None:
    smallest, largest = RANGES[key]
    if number is None or ((smallest is None or number >= smallest) and (largest is None or number <= largest)):
        return
    bounds = [
        f"at least {smallest:g}" if smallest is not None else "",
        f"at most {largest:g}" if largest is not None else "",
    ]
    raise ConfigError(f"{key}={number}: must be {' and '.join(filter(None, bounds))}")


def _validate_training(config: TrainRun) -> None:
    train, draft = config.train, config.draft
    if not config.data.train_files:
        raise ConfigError("data.train_files=[]: name at least one JSONL file of conversations")
    _validate_features(config.features)
    if config.target.device_map is not None and config.features.target_device != "same":
        raise ConfigError(
            f"target.device_map={config.target.device_map} and features.target_device={config.features.target_device}: "
            "both say where the target lies; leave one of them out"
        )
    if train.steps is None and not train.epochs:
        raise ConfigError(f"train.epochs={train.epochs}: must be above 0 when train.steps is not set")
    if train.start_from is not None and train.resume not in ("auto", "never"):
        raise ConfigError(
            f"train.resume={train.resume} and train.start_from={train.start_from}: the first continues a run with its "
            "optimizer, the second begins a new one; give one of them"
        )
    if train.tokens_per_batch is not None and train.micro_batch_size is not None:
        raise ConfigError(
            f"train.micro_batch_size={train.micro_batch_size} and train.tokens_per_batch={train.tokens_per_batch}: "
            "padded and packed batches exclude each other; set one of them to null"
        )
    if train.tokens_per_batch is not None and train.tokens_per_batch < config.data.max_length:
        raise ConfigError(
            f"train.tokens_per_batch={train.tokens_per_batch}: must be at least data.max_length="
            f"{config.data.max_length}, so that the longest sample fits"
        )
    if train.global_batch_size % (train.micro_batch_size or 1):
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size}: must be a multiple of "
            f"train.micro_batch_size={train.micro_batch_size} (times the number of ranks)"
        )
    if train.loss.ce == train.loss.tv == 0:
        raise ConfigError("train.loss.ce=0 and train.loss.tv=0: nothing would train the draft; set one above 0")
    if draft.algorithm != "dspark" and (draft.markov_rank or draft.confidence_head):
        raise ConfigError(
            f"draft.algorithm={draft.algorithm} has no heads, but draft.markov_rank={draft.markov_rank} and "
            f"draft.confidence_head={draft.confidence_head}; choose the group with draft={draft.algorithm}, or set 0 "
            "and false"
        )


def _validate_features(features: FeaturesConfig) -> None:
    remote = features.source in ("served", "vllm")
    if remote and not features.urls:
        raise ConfigError(f"features.urls=[]: features.source={features.source} needs at least one http://host:port")
    if features.urls and not remote:
        raise ConfigError(f"features.urls={features.urls}: only features.source=served or vllm asks servers")
    for url in features.urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"features.urls: {url}: must begin with http:// or https://")
    if features.dtype is not None and features.source != "served":
        raise ConfigError(f"features.dtype={features.dtype}: only features.source=served sends features")
