"""Measure a draft: decode prompt sets with it and, interleaved, without it (DSpark section 5).

Chunks of prompts are dealt out to the ranks; each chunk is decoded both ways, one after the other, so that whatever
slows the machine slows both and the speed-up is a ratio of pairs. Which way goes first alternates. What a chunk of
prompts with several turns goes through is in `deepspec.evaluation.decoder`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

from deepspec.config import EvalRun, flatten
from deepspec.decoding import SpeculativeEngine, proposer_of
from deepspec.decoding.policies import build_policy
from deepspec.decoding.recorded_rounds import METRICS_FILE
from deepspec.drafts import load_draft
from deepspec.environment import command_line, machine, versions
from deepspec.evaluation.decoder import Decoder
from deepspec.evaluation.plan import Chunk, Plan, make_plan
from deepspec.evaluation.progress import EvaluationProgress, make_console
from deepspec.evaluation.records import Key, Record, RecordStore
from deepspec.evaluation.summary import print_table, results_of, samples_of, write_results
from deepspec.ranks import start_ranks
from deepspec.targets import describe_target, dtype_name, load_target


def evaluate(config: EvalRun) -> dict[str, Any]:
    """Decode what is not decoded yet, then write OUTPUT/metrics.json, samples.jsonl and rounds.jsonl (rank 0).

    Returns:
        The content of metrics.json, on every rank: `draft`, `target`, `settings`, `versions`, `machine`, `command` and
        `results`, one entry per temperature (see `deepspec.evaluation.summary.results_of`).

    Raises:
        ConfigError, DataError, FileNotFoundError, ValueError: see `make_plan`, `load_target` and `load_draft`.
        SystemExit: interrupted from the keyboard; finished chunks are kept.
    """
    state = start_ranks()
    with state.local_main_process_first():
        plan = make_plan(config)
    store = RecordStore(config.output_dir, plan.settings_digest, state.process_index)
    console = make_console(is_main=state.is_main_process)
    if plan.rendering_note:
        console.print(plan.rendering_note, soft_wrap=True, markup=False)
    for name, count in plan.skipped.items():
        if count:
            console.print(f"{name}: {count} prompts are too long and are skipped", soft_wrap=True)
    wanted = [chunk.key for chunk in plan.chunks]
    found = _known_records(store, wanted, config.eval.baseline, console)
    pending = [chunk for chunk in plan.chunks if chunk.key not in found]
    mine = pending[state.process_index :: state.num_processes]
    made: list[Record] = []
    fingerprint = None
    if mine:
        try:
            made, fingerprint = _decode(config, plan, mine, store, state)
        except KeyboardInterrupt:
            console.print(
                f"interrupted; finished prompts are kept in {config.output_dir}: run the command again to go on",
                soft_wrap=True,
            )
            raise SystemExit(130) from None
    everything = found | {record.key: record for record in gather_object(made)}
    records = [everything[key] for key in wanted]
    fingerprint = next(filter(None, gather_object([fingerprint])), None)
    metrics = _metrics(config, plan, records, fingerprint) | ({} if pending else _measured_on(store))
    if state.is_main_process:
        store.consolidate(records)
        decode = plan.tokenizer.decode
        samples = samples_of(records, plan.prompts, lambda ids: decode(ids, skip_special_tokens=True))
        write_results(config.output_dir, metrics, samples)
        if failed := sum(values["failed"] for result in metrics["results"] for values in result["sets"].values()):
            console.print(
                f"{failed} prompts ended early because their logits were not finite; is a model damaged, or "
                f"target.dtype={dtype_name(plan.target_dtype)} too narrow?",
                soft_wrap=True,
            )
        if not pending:
            console.print(f"all prompts were decoded before: results from {config.output_dir}", soft_wrap=True)
        print_table(metrics, console)
    else:
        store.part.unlink(missing_ok=True)
    state.wait_for_everyone()
    return metrics


def _known_records(store: RecordStore, wanted: Sequence[Key], baseline: bool, console: Console) -> dict[Key, Record]:
    """Usable records of earlier runs, from the files of all ranks."""
    local, outdated = store.read()
    if outdated:
        console.print(
            f"{store.folder}: {outdated} chunks were decoded under other settings and are decoded again", soft_wrap=True
        )
    keys = set(wanted)
    usable = [r for r in local.values() if r.key in keys and (r.plain is not None or not baseline)]
    return {record.key: record for record in gather_object(usable)}


def _decode(
    config: EvalRun, plan: Plan, chunks: list[Chunk], store: RecordStore, state: PartialState
) -> tuple[list[Record], str]:
    """Decode this rank's chunks; each is on disk before the next begins. Returns them and the target's fingerprint."""
    decoder = _load(config, plan, state.device)
    decoder.warm_up(chunks[0])
    made = []
    prompts = sum(len(chunk.prompts) for chunk in chunks)
    with EvaluationProgress(prompts, is_main=state.is_main_process) as progress:
        on_ranks = f", on each of {state.num_processes} ranks" if state.num_processes > 1 else ""
        progress.say(describe_target(decoder.speculative.target))
        progress.say(f"decoding {prompts} prompts{on_ranks}, {state.device}; interrupt and go on at any time")
        for number, chunk in enumerate(chunks):
            record = decoder.decode(chunk, plain_first=number % 2 == 1)
            store.append(record)
            made.append(record)
            progress.finished(record)
    return made, decoder.speculative.target.fingerprint


def _load(config: EvalRun, plan: Plan, device: torch.device) -> Decoder:
    target = load_target(
        config.target.path,
        revision=config.target.revision,
        gguf_file=config.target.gguf_file,
        dtype=plan.target_dtype,
        device=device,
    )
    draft = load_draft(
        plan.draft_folder,
        dtype=plan.target_dtype,
        device=device,
        target=target,
        allow_other_target=config.eval.allow_other_target,
    )

    def text_of(ids: list[int]) -> str:
        """Special tokens stay, so that a stop string may name one."""
        return str(plan.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    speculative = SpeculativeEngine(
        target,
        proposer_of(draft, target, allow_other_target=config.eval.allow_other_target),
        slots=config.decode.batch_size,
        max_length=plan.max_length,
        policy=build_policy(config.decode.policy, replace(plan.policy_setup, device=device)),
        verification=config.decode.verification,
        decode=text_of,
    )
    plain = None
    if config.eval.baseline:
        plain = SpeculativeEngine(target, slots=config.decode.batch_size, max_length=plan.max_length, decode=text_of)
    return Decoder(config, plan, speculative, plain, text_of)


def _measured_on(store: RecordStore) -> dict[str, Any]:
    """Target, machine, versions and command of the run that decoded what is there already."""
    file = store.folder / METRICS_FILE
    try:
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        earlier = {}
    if earlier.get("settings_digest") != store.settings_digest:
        return {}
    return {key: earlier[key] for key in ("target", "machine", "versions", "command")}


def _metrics(config: EvalRun, plan: Plan, records: Sequence[Record], fingerprint: str | None) -> dict[str, Any]:
    """Args: `fingerprint` of the target; None where nothing had to be decoded."""
    results = results_of(
        records,
        sets=list(plan.prompts),
        temperatures=list(dict.fromkeys(config.eval.temperatures)),
        block_size=plan.draft_settings.draft_length,
        baseline=config.eval.baseline,
        bootstrap_samples=config.eval.bootstrap_samples,
        seed=config.seed,
        skipped=plan.skipped,
        asked={name: [len(prompt.given) for prompt in of_set] for name, of_set in plan.prompts.items()},
    )
    checkpoint = Path(config.checkpoint)
    draft = {
        "checkpoint": config.checkpoint,
        "folder": str(plan.draft_folder),
        "name": checkpoint.resolve().name if checkpoint.exists() else config.checkpoint,
        "algorithm": plan.draft_settings.algorithm,
        "block_size": plan.draft_settings.draft_length,
        "weights": plan.draft_weights,
        "target_fingerprint": getattr(plan.draft_config, "target_fingerprint", None),
        "config": {**asdict(plan.draft_settings), "target_layer_ids": list(plan.draft_settings.target_layer_ids)},
    }
    target = {
        "path": config.target.path,
        "revision": config.target.revision,
        "gguf_file": config.target.gguf_file,
        "dtype": dtype_name(plan.target_dtype),
        "fingerprint": fingerprint,
    }
    return {
        "draft": draft,
        "target": target,
        "results": results,
        "settings": flatten(replace(config, data=plan.data)) | {"target.dtype": dtype_name(plan.target_dtype)},
        "settings_digest": plan.settings_digest,
        "machine": machine(),
        "versions": versions(),
        "command": command_line(),
    }
