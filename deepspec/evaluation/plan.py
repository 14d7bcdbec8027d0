"""What an evaluation has to decode, and what its numbers depend on. Found out before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deepspec.config import ConfigError, DataConfig, EvalRun
from deepspec.data.jsonl import DataError
from deepspec.data.rendering import Rendering, as_in_training
from deepspec.decoding.calibration import load_calibration
from deepspec.decoding.policies import SCHEDULERS, PolicySetup, build_policy
from deepspec.decoding.sps import SPS_FILE, SpsTable, load_table
from deepspec.drafts.configuration import DraftSettings
from deepspec.drafts.loading import find_draft_folder, read_draft_config
from deepspec.evaluation.records import Key, digest_of
from deepspec.evaluation.sets import Prompt, load_set
from deepspec.files import sha256_of
from deepspec.targets import (
    dtype_name,
    load_target_config,
    load_tokenizer,
    position_range,
    resolve_dtype,
    resolve_path,
    stop_tokens,
)
from deepspec.targets.weights import open_weights

# An answer may take more tokens in a later prompt than were decoded: so many for each, and in all.
RENDERED_AGAIN, RENDERED_MORE = 1.25, 32


@dataclass(frozen=True)
class Chunk:
    """Consecutive prompts of a set, decoded together at one temperature."""

    set_name: str
    temperature: float
    start: int  # place of the first one among those of the set that are decoded
    prompts: Sequence[Prompt]
    max_length: int | None = None  # decode.max_length, which decides what later turns are too long

    @property
    def key(self) -> Key:
        """As of its `Record`."""
        identities: list[Any] = [prompt.ids for prompt in self.prompts]
        if any(prompt.later for prompt in self.prompts):
            identities.append([[prompt.later for prompt in self.prompts], self.max_length])
        return (self.set_name, self.temperature, self.start, digest_of(identities))


@dataclass(frozen=True)
class Plan:
    """A checked evaluation."""

    draft_folder: Path
    draft_config: PreTrainedConfig
    draft_settings: DraftSettings
    draft_weights: dict[str, str]  # file -> sha256
    policy_setup: PolicySetup  # on the CPU
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig  # its keys of rendering as they are used
    rendering_note: str | None  # about them, for the user
    prompts: dict[str, list[Prompt]]  # by set, those that are decoded
    skipped: dict[str, int]  # by set, how many are too long
    chunks: list[Chunk]
    stop_token_ids: tuple[int, ...]
    positions: int  # of the target
    max_length: int  # positions per slot
    target_dtype: torch.dtype
    settings_digest: str  # of all that outputs and speeds depend on, except prompts and temperature


def make_plan(config: EvalRun) -> Plan:
    """Read the draft's config, the tokenizer and the prompt sets.

    Raises:
        ConfigError: an unknown set, no set at all, or a policy that cannot work, see `build_policy`.
        DataError: a damaged set, SPS table or calibration, or a set without a prompt that fits, see `_that_fit`.
        FileNotFoundError: no such draft, target or SPS table.
    """
    if not config.eval.sets:
        raise ConfigError("eval.sets=[]: name at least one prompt set")
    if not config.eval.temperatures:
        raise ConfigError("eval.temperatures=[]: name at least one temperature")
    target = config.target
    positions = position_range(load_target_config(target.path, target.revision, target.gguf_file))
    tokenizer = load_tokenizer(
        target.path, revision=target.revision, gguf_file=target.gguf_file, chat_template=config.data.chat_template
    )
    dtype = resolve_dtype(target.dtype, target.path, revision=target.revision, gguf_file=target.gguf_file)
    folder = find_draft_folder(config.checkpoint)
    draft_config = read_draft_config(folder)
    data, note = _rendered_as(config.data, tokenizer, draft_config)
    settings = DraftSettings.of(draft_config)
    setup = _policy_setup(config, settings, folder)
    build_policy(config.decode.policy, setup)  # or refuse
    listed = {
        name: load_set(
            name,
            config.eval.prompts_dir,
            tokenizer,
            limit=config.eval.limit,
            template_options=data.template_options,
            system_prompt=data.system_prompt,
            first_turn_only=config.eval.first_turn_only,
        )
        for name in dict.fromkeys(config.eval.sets)
    }
    prompts = {
        name: _that_fit(of_set, name, config, positions, settings.draft_length) for name, of_set in listed.items()
    }
    size = config.decode.batch_size
    chunks = [
        Chunk(name, temperature, start, of_set[start : start + size], config.decode.max_length)
        for temperature in dict.fromkeys(config.eval.temperatures)
        for name, of_set in prompts.items()
        for start in range(0, len(of_set), size)
    ]
    weights = {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}
    stops = stop_tokens(target.path, target.revision, tokenizer, target.gguf_file)
    decoding = _decoding_settings(config, setup)
    return Plan(
        folder,
        draft_config,
        settings,
        weights,
        setup,
        tokenizer,
        data,
        note,
        prompts,
        {name: len(of_set) - len(prompts[name]) for name, of_set in listed.items()},
        chunks,
        stops,
        positions,
        config.decode.max_length
        or max(
            _slot_length(prompt, config, positions, settings.draft_length) for of in prompts.values() for prompt in of
        ),
        dtype,
        digest_of([weights, target_identity(config), dtype_name(dtype), decoding, config.seed, stops]),
    )


def _rendered_as(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, draft_config: PreTrainedConfig
) -> tuple[DataConfig, str | None]:
    """The keys of rendering, as the draft was trained where they are not given, and what to say about them."""
    trained = Rendering.recorded_in(draft_config)
    used = as_in_training(data, tokenizer, trained)
    if trained is None:
        return used, "how the draft's training rendered prompts is not recorded; data.template_options has to say it"
    if differences := Rendering.of(tokenizer, used).differences(trained):
        return used, f"prompts are rendered otherwise than the draft was trained: {'; '.join(differences)}"
    special = [f"data.{key}={value}" for key, value in trained.keys_given().items()]
    return used, f"prompts are rendered as the draft was trained: {', '.join(special)}" if special else None


def _sps_table(config: EvalRun, draft_folder: Path) -> SpsTable | None:
    """The table that `decode.sps` names, else the one that was measured beside the draft; None if no policy asks."""
    if config.decode.policy not in SCHEDULERS:
        return None
    beside = draft_folder / SPS_FILE
    name = config.decode.sps or (beside if beside.is_file() else None)
    return load_table(name) if name else None


def _policy_setup(config: EvalRun, settings: DraftSettings, draft_folder: Path) -> PolicySetup:
    """What `decode.policy` is built from, with the calibration that lies beside the draft, if any.

    Raises:
        DataError, FileNotFoundError: see `load_table` and `load_calibration`.
    """
    decode = config.decode
    return PolicySetup(
        block_size=settings.draft_length,
        rows=decode.batch_size,
        has_confidences=settings.confidence_head,
        draft_tokens=decode.draft_tokens,
        confidence_threshold=decode.confidence_threshold,
        sps=_sps_table(config, draft_folder),
        temperatures=load_calibration(draft_folder, settings.draft_length),
    )


def new_tokens(prompt_ids: Sequence[int], max_new_tokens: int, positions: int) -> int:
    """How many tokens may follow a prompt: `max_new_tokens`, or fewer where the target's positions end before."""
    return min(max_new_tokens, positions - len(prompt_ids))


def _needed(prompt_ids: Sequence[int], config: EvalRun, positions: int, block_size: int) -> int:
    """Positions of a slot: the prompt, its answer and a block."""
    return len(prompt_ids) + new_tokens(prompt_ids, config.decode.max_new_tokens, positions) + block_size


def fits(prompt_ids: Sequence[int], config: EvalRun, positions: int, max_length: int, block_size: int) -> bool:
    """Whether the target reads a prompt with room for an answer, and a slot of `max_length` positions holds both."""
    return len(prompt_ids) < positions and _needed(prompt_ids, config, positions, block_size) <= max_length


def _slot_length(prompt: Prompt, config: EvalRun, positions: int, block_size: int) -> int:
    """Positions that all turns of a prompt need, if each answer is as long as it may be."""
    if prompt.later is None:
        return _needed(prompt.ids, config, positions, block_size)
    answers = len(prompt.given) - 1
    without_answers = len(prompt.ids_after([""] * answers))
    longest = without_answers + answers * (int(config.decode.max_new_tokens * RENDERED_AGAIN) + RENDERED_MORE)
    return min(longest + config.decode.max_new_tokens, positions) + block_size


def _that_fit(
    prompts: Sequence[Prompt], set_name: str, config: EvalRun, positions: int, block_size: int
) -> list[Prompt]:
    """Without those that the target cannot read with room for an answer, or that need more than `decode.max_length`.

    Raises:
        ConfigError, DataError: none is left.
    """
    readable = [prompt for prompt in prompts if len(prompt.ids) < positions]
    if not readable:
        raise DataError(
            f"eval.sets: no prompt of '{set_name}' fits: the shortest has {min(len(p.ids) for p in prompts)} tokens, "
            f"and target {config.target.path} reads at most {positions} with room for an answer"
        )
    given = config.decode.max_length
    needed = {prompt.index: _needed(prompt.ids, config, positions, block_size) for prompt in readable}
    if given is None or given >= max(needed.values()):
        return readable
    if given < min(needed.values()):
        raise ConfigError(
            f"decode.max_length={given}: no prompt of '{set_name}' fits: with decode.max_new_tokens="
            f"{config.decode.max_new_tokens} and a block of {block_size} even the shortest needs "
            f"{min(needed.values())}; raise it, or set null"
        )
    return [prompt for prompt in readable if needed[prompt.index] <= given]


def _decoding_settings(config: EvalRun, setup: PolicySetup) -> dict[str, Any]:
    """All that the decoding depends on, the contents of the files that it names included."""
    settings = {name: value for name, value in asdict(config.decode).items() if name != "max_length"}
    settings["sps"] = setup.sps and asdict(setup.sps)
    if config.decode.policy != "fixed":
        settings["temperatures"] = setup.temperatures
    return settings


def target_identity(config: EvalRun) -> list[Any]:
    """Tells targets apart: the name, and of a local folder the fingerprint of its weights and what its config says."""
    target = config.target
    folder = Path(resolve_path(target.path, target.gguf_file))
    identity: list[Any] = [target.path, target.revision, *([target.gguf_file] if target.gguf_file else [])]
    if folder.is_dir():
        identity.append(open_weights(target.path, target.revision, target.gguf_file).fingerprint)
        identity += [sha256_of(file) for file in (folder / "config.json",) if file.is_file()]
    return identity
