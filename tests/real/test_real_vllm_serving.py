"""vLLM serves our drafts and accepts what our engine accepts:
`python -m pytest -m real -s tests/real/test_real_vllm_serving.py`.

Greedily, 60 prompts: the same text, and for each prompt the same number of rounds and of accepted tokens at each
position. At temperature 1 both are lossless and draw differently, so that tau agrees within its error bars only.
vLLM counts accepted tokens past a stop token, which ours does not: both decode past the end of the text here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import stdev
from typing import Any

import environments
import pytest
import torch
from counts import chat_prompts, counts_of, ours, survival
from engines import HERE, drive, run
from trained_drafts import RECIPES, corpus, train, trained_draft
from worlds import BUILTIN

from deepspec.decoding import proposer_of
from deepspec.drafts import load_draft
from deepspec.targets import Target, load_target

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]
PROMPTS, SMOLLM2_PROMPTS, NEW_TOKENS, LONGEST = 60, 8, 64, 192


@pytest.fixture(scope="module")
def builtin() -> Target:
    return load_target("builtin", dtype=torch.float32)


def theirs(folder: Path, target: Path, draft: Path, prompts: list[list[int]], **sampling: Any) -> dict[str, Any]:
    """What vLLM says and accepts with the draft."""
    loaded, served = load_draft(draft), draft
    if loaded.algorithm == "eagle3":  # vLLM has Qwen3's shape in the layout of speculators alone
        served = folder / "speculators"
        words = [f"checkpoint={draft}", "format=speculators", f"output_dir={served}", f"target={target}"]
        run(HERE, "-m", "deepspec.publishing", "export", *words)
    speculative = {"method": loaded.algorithm, "model": str(served), "num_speculative_tokens": loaded.draft_length}
    if sampling:
        speculative["draft_sample_method"] = "probabilistic"
    answer = drive(
        environments.vllm(),
        "vllm_generate",
        folder,
        target=target,
        prompts=prompts,
        max_new_tokens=NEW_TOKENS,
        speculative=speculative,
        sampling=sampling,
    )
    answer["counts"] = [Counter({name: int(value) for name, value in each.items()}) for each in answer["counts"]]
    return answer


def compare_greedily(target: Target, place: Path, draft: Path, prompts: list[list[int]], folder: Path) -> None:
    loaded = load_draft(draft, target=target)
    completions = ours(target, proposer_of(loaded, target), prompts, NEW_TOKENS)
    answer = theirs(folder, place, draft, prompts)
    our_counts = [counts_of(completion) for completion in completions]
    report("ours", our_counts, loaded.draft_length)
    report(f"vLLM {answer['version']}", answer["counts"], loaded.draft_length)
    for number, (completion, text) in enumerate(zip(completions, answer["outputs"], strict=True)):
        assert completion.output_ids == text, f"prompt {number}"
    for number, (mine, others) in enumerate(zip(our_counts, answer["counts"], strict=True)):
        assert +mine == +others, f"prompt {number}"
    assert sum(counts["accepted"] for counts in our_counts) > 0.02 * sum(counts["drafts"] for counts in our_counts)


def report(name: str, counts: list[Counter[str]], length: int) -> None:
    *positions, tau = survival(counts, length)
    rounds = sum(each["drafts"] for each in counts)
    print(f"{name}: tau {tau:.4f} over {rounds} rounds, accepted by position", [f"{share:.4f}" for share in positions])


@pytest.mark.parametrize("algorithm", RECIPES)
def test_greedy_text_and_accepted_counts_are_ours(builtin: Target, algorithm: str, tmp_path: Path):
    prompts = chat_prompts(BUILTIN, corpus() / "heldout.jsonl", PROMPTS, LONGEST)
    compare_greedily(builtin, BUILTIN, trained_draft(algorithm), prompts, tmp_path)


@pytest.mark.parametrize("algorithm", RECIPES)
def test_tau_at_temperature_1(builtin: Target, algorithm: str, tmp_path: Path):
    draft = trained_draft(algorithm)
    prompts = chat_prompts(BUILTIN, corpus() / "heldout.jsonl", PROMPTS, LONGEST)
    loaded = load_draft(draft, target=builtin)
    completions = ours(builtin, proposer_of(loaded, builtin), prompts, NEW_TOKENS, temperature=1.0)
    answer = theirs(tmp_path, BUILTIN, draft, prompts, temperature=1.0)
    taus, errors = [], []
    for name, counts in {"ours": list(map(counts_of, completions)), "vLLM": answer["counts"]}.items():
        report(name, counts, loaded.draft_length)
        tau = survival(counts, loaded.draft_length)[-1]
        rounds = sum(each["drafts"] for each in counts) / len(counts)
        off = [(each["accepted"] - (tau - 1) * each["drafts"]) / rounds for each in counts]  # a ratio's residuals
        taus.append(tau)
        errors.append(stdev(off) / len(counts) ** 0.5)
    print(f"tau {taus[0]:.3f} +- {errors[0]:.3f} ours, {taus[1]:.3f} +- {errors[1]:.3f} vLLM's")
    assert abs(taus[0] - taus[1]) < 3 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5


def test_smollm2(tmp_path: Path):
    place = environments.smollm2_weights()
    words = ["recipes=smoke_dflash_fill_in", f"target.path={place}", "draft.start_from_target=false"]
    words += [
        "draft.target_layer_ids=[1,14,27]",
        "train.global_batch_size=4",
        "train.num_anchors=12",
        "data.eval_samples=8",
    ]
    words += [f"data.chat_template={BUILTIN / 'chat_template.jinja'}"]  # the model's own marks no assistant tokens
    draft = train(words, tmp_path / "run", steps=60)
    target = load_target(str(place), dtype=torch.float32)
    prompts = chat_prompts(place, corpus() / "heldout.jsonl", SMOLLM2_PROMPTS, LONGEST)
    compare_greedily(target, place, draft, prompts, tmp_path)
