"""vLLM decodes prompts, one after another, and counts what it accepts of each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import vllm
from driving import answer
from vllm import LLM, SamplingParams
from vllm_repairs import key_norm_of_each_layer, temperature_of_each_token

COUNTERS = {"drafts": "num_drafts", "drafted": "num_draft_tokens", "accepted": "num_accepted_tokens"}


def generate(
    target: str,
    prompts: list[list[int]],
    max_new_tokens: int,
    speculative: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    max_model_len: int = 512,
    repaired: bool = True,
) -> dict[str, Any]:
    """Output ids and counts of each prompt: drafts, tokens drafted and accepted, and accepted by position.

    Args:
        sampling: further arguments of SamplingParams; greedy and past the end of the text without.
        repaired: see vllm_repairs.
    """
    if repaired:
        key_norm_of_each_layer()
        temperature_of_each_token()
    llm = LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=max_model_len,
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config=speculative,
        disable_log_stats=False,
    )
    outputs, counts, before = [], [], Counter()
    for number, prompt in enumerate(prompts):
        settings = {"temperature": 0.0, "ignore_eos": True} | (sampling or {})
        parameters = SamplingParams(max_tokens=max_new_tokens, seed=number, **settings)
        result = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        outputs.append(list(result[0].outputs[0].token_ids))
        if speculative:
            now = counted(llm)
            counts.append({name: value - before[name] for name, value in now.items()})
            before = now
    return {"version": vllm.__version__, "outputs": outputs, "counts": counts}


def counted(llm: LLM) -> Counter[str]:
    """What the engine has counted so far; accepted tokens also by position, under "0", "1", ..."""
    now: Counter[str] = Counter()
    for metric in llm.get_metrics():
        for name, suffix in COUNTERS.items():
            if metric.name == f"vllm:spec_decode_{suffix}":
                now[name] += metric.value
        if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            now.update({str(position): value for position, value in enumerate(metric.values)})
    return now


if __name__ == "__main__":
    answer(generate)
