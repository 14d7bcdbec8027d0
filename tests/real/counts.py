"""Our engine beside another one: the same prompts, what was said, and what was accepted at each position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from deepspec.data.jsonl import read_jsonl
from deepspec.decoding import Completion, Proposer, Request, SpeculativeEngine
from deepspec.targets import Target


def chat_prompts(target: Path, rows: Path, count: int, longest: int) -> list[list[int]]:
    """Token ids of the first user turns, as the target's template renders them."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    rendered = (
        tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
        for _, row in read_jsonl(rows)
    )
    chosen = [ids for ids in rendered if len(ids) <= longest][:count]
    assert len(chosen) == count
    return chosen


def ours(
    target: Target,
    proposer: Proposer | None,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[Completion]:
    """Past the end of the text, one request at a time, as drivers/vllm_generate.py does."""
    longest = max(map(len, prompts)) + max_new_tokens + 16
    engine = SpeculativeEngine(target, proposer, slots=1, max_length=longest)
    requests = [
        Request(prompt, max_new_tokens, temperature=temperature, seed=number) for number, prompt in enumerate(prompts)
    ]
    with torch.inference_mode():
        return engine.generate(requests)


def counts_of(completion: Completion) -> Counter[str]:
    """What vLLM counts."""
    counts: Counter[str] = Counter()
    for each in completion.rounds:
        counts += Counter(drafts=1, drafted=each.proposed, accepted=each.accepted)
        counts.update(str(position) for position in range(each.accepted))
    return counts


def survival(counts: Sequence[Counter[str]], length: int) -> list[float]:
    """The share of rounds in which position k was accepted, and tau at the end."""
    together = sum((Counter(each) for each in counts), Counter())
    by_position = [together[str(position)] / together["drafts"] for position in range(length)]
    return [*by_position, 1 + together["accepted"] / together["drafts"]]
