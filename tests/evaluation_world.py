"""A small evaluation for tests: a random target, a random draft that proposes 3 tokens a round, prompt sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_target_config
from transformers import Qwen3ForCausalLM

from deepspec.config import DataConfig, DecodeConfig, EvalConfig, EvalRun, TargetConfig
from deepspec.data.tokenizer import train_tokenizer
from deepspec.drafts import DSparkModel
from deepspec.targets import load_target


def small_evaluation(
    folder: Path,
    tiny_draft: Callable[..., DSparkModel],
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    positions: int = 96,
    temperatures: Sequence[float] = (1.0, 0.0),
) -> EvalRun:
    """Args: `sets`, the rows of each prompt set; `positions` that the target reads."""
    tokenizer = train_tokenizer(["What is two plus two?"], vocab_size=280)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny_target_config(vocab_size=len(tokenizer), max_position_embeddings=positions))
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    target = load_target(str(folder / "target"))
    draft = tiny_draft(
        target_changes={"vocab_size": len(tokenizer)}, block_size=3, mask_token_id=tokenizer.mask_token_id
    )
    draft.tie_to_target(target)
    draft.save_pretrained(folder / "draft")
    (folder / "prompts").mkdir()
    for name, rows in sets.items():
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / "prompts" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return EvalRun(
        checkpoint=str(folder / "draft"),
        target=TargetConfig(path=str(folder / "target")),
        data=DataConfig(),
        decode=DecodeConfig(max_new_tokens=12, batch_size=2),
        eval=EvalConfig(
            sets=list(sets),
            prompts_dir=str(folder / "prompts"),
            temperatures=list(temperatures),
            bootstrap_samples=50,
        ),
        output_dir=str(folder / "out"),
    )
