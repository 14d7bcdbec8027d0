"""Write, check and mend a feature cache: `python -m data_prep.cache [verify|repair] [recipes=NAME] [key=value ...]`.

Takes the keys of the training run that the cache is for (features.cache_dir, cache_dtype, cache_shard_mib among them).
Interrupted, the same command goes on with the first missing shard. Many ranks write at once, with `accelerate launch -m
data_prep.cache ...` or with RANK=i WORLD_SIZE=n in the environment of n processes, which share nothing but the folder.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from safetensors.torch import save

from data_prep.estimate import Contents, console, contents_of, in_words, run_with_training_keys, say, show_estimate
from deepspec.config import CacheRun, ConfigError, near_match
from deepspec.features.cache_check import damaged_descriptions, damaged_shards, discard
from deepspec.features.cache_format import (
    CachedRendering,
    CacheError,
    CacheSettings,
    read_settings,
    repair_command,
    shard_file,
)
from deepspec.features.cache_plan import free_bytes, shard_bounds
from deepspec.features.cache_storage import STORAGES
from deepspec.features.cache_writer import CachePlan, begin, check_folder, documents_tensors, finish, write_shards
from deepspec.ranks import launched_rank, launched_ranks, rank_device
from deepspec.targets import dtype_name, load_target, load_target_head

ACTIONS = ("write", "verify", "repair")


def write(run: CacheRun) -> None:
    """Estimate, compare with the free disk, and write this rank's missing shards."""
    contents = contents_of(run)
    plan = plan_of(run, contents)
    check_folder(plan)
    write_missing(run, contents, plan)


def write_missing(run: CacheRun, contents: Contents, plan: CachePlan) -> None:
    shards, missing = plan.settings.shards, plan.missing_shards()
    if launched_rank() == 0:
        show_estimate(run, contents)
        say(f"{plan.folder}: {shards - len(missing)} of {shards} shards are complete")
    check_space(run, contents, plan, missing)
    begin(plan)
    mine = [number for number in missing if number % launched_ranks() == launched_rank()]
    if mine:
        target = load_target(
            run.target.path,
            revision=run.target.revision,
            gguf_file=run.target.gguf_file,
            dtype=run.target.dtype,
            device=rank_device(),
            device_map=run.target.device_map,
        )
        with progress("tokens", tokens_of(plan, mine)) as advance:
            write_shards(plan, mine, target, batch_tokens=run.features.cache_batch_tokens, advance=advance)
    if finish(plan):
        say(f"{plan.folder}: complete; train with features.source=cached features.cache_dir={plan.folder}")
    else:
        say(f"{plan.folder}: {len(plan.missing_shards())} of {shards} shards are left to ranks that are still writing")


def verify(run: CacheRun) -> None:
    """Compare every byte with what was written."""
    if damaged := look_for_damage(Path(run.features.cache_dir)):
        raise CacheError("\n".join([*damaged.values(), "", repair_command(Path(run.features.cache_dir))]))
    say(f"{run.features.cache_dir}: every file is as it was written")


def repair(run: CacheRun) -> None:
    """Delete what differs from what was written, and write it again."""
    contents = contents_of(run)
    plan = plan_of(run, contents)
    check_folder(plan)
    damaged = look_for_damage(plan.folder)
    for message in damaged.values():
        say(message)
    if damaged:
        discard(plan.folder, [number for number in damaged if isinstance(number, int)])
    write_missing(run, contents, plan)


def look_for_damage(folder: Path) -> dict[int | str, str]:
    """Messages by shard number (this rank's share) or name of another file."""
    messages: dict[int | str, str] = {
        name: f"{folder / name}: {damage}" for name, damage in damaged_descriptions(folder).items()
    }
    numbers = range(launched_rank(), read_settings(folder).shards, launched_ranks())
    with progress("shards", len(numbers)) as advance:
        found = damaged_shards(folder, numbers, advance)
    return messages | {number: f"{shard_file(folder, number)}: {damage}" for number, damage in found.items()}


def plan_of(run: CacheRun, contents: Contents) -> CachePlan:
    """What is to be written for a run; reads the target's weight files for its fingerprint, and loads no layer."""
    survey, features = contents.survey, run.features
    head = load_target_head(
        run.target.path, revision=run.target.revision, gguf_file=run.target.gguf_file, dtype=run.target.dtype
    )
    bounds = shard_bounds(contents.document_bytes(features.cache_dtype), int(features.cache_shard_mib * 2**20))
    settings = CacheSettings(
        target=head.name_or_path,
        target_revision=run.target.revision,
        target_fingerprint=head.fingerprint,
        target_dtype=dtype_name(head.dtype),
        rendering=CachedRendering.of(contents.tokenizer, run.data),
        layer_ids=contents.layer_ids,
        hidden_size=contents.hidden_size,
        dtype=features.cache_dtype,
        samples=survey.samples,
        documents=len(survey),
        tokens=int(survey.tokens.sum()),
        shards=len(bounds) - 1,
        documents_sha256=hashlib.sha256(save(documents_tensors(survey, bounds))).hexdigest(),
        data_files=[*run.data.train_files, *run.data.eval_files],
    )
    return CachePlan(Path(features.cache_dir), settings, survey, bounds)


def tokens_of(plan: CachePlan, shards: list[int]) -> int:
    return sum(int(plan.survey.tokens[plan.bounds[n] : plan.bounds[n + 1]].sum()) for n in shards)


def check_space(run: CacheRun, contents: Contents, plan: CachePlan, missing: list[int]) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        CacheError: the missing shards need more than is free; with the numbers.
    """
    sizes = contents.document_bytes(run.features.cache_dtype)
    needed = sum(int(sizes[plan.bounds[n] : plan.bounds[n + 1]].sum()) for n in missing)
    free = free_bytes(plan.folder)
    if needed > free and not run.force:
        others = ", ".join(f"{dtype} {in_words(contents.total_bytes(dtype))}" for dtype in STORAGES)
        raise CacheError(
            f"features.cache_dir={plan.folder}: {in_words(needed)} are needed for {len(missing)} shards in "
            f"{run.features.cache_dtype}, but {in_words(free)} are free. A whole cache takes: {others}. Choose another "
            "features.cache_dtype or features.cache_dir, or write all the same with force=true"
        )


class Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} {task.description}/s")


@contextmanager
def progress(unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time on rank 0; nothing on the others."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=launched_rank() != 0, speed_estimate_period=300) as bar:
        task = bar.add_task(unit, total=total)
        yield lambda count: bar.advance(task, count)


def take_action(arguments: list[str]) -> str:
    """Remove the action from command line words; without one it is `write`.

    Raises:
        ConfigError: an unknown one.
    """
    if len(arguments) < 2 or "=" in arguments[1] or arguments[1].startswith("-"):
        return "write"
    action = arguments.pop(1)
    if action not in ACTIONS:
        raise ConfigError(f"unknown action '{action}': {', '.join(ACTIONS)} or key=value.{near_match(action, ACTIONS)}")
    return action


if __name__ == "__main__":
    try:
        action = take_action(sys.argv)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    run_with_training_keys({"write": write, "verify": verify, "repair": repair}[action])
