"""The built-in target: a small Qwen3 language model trained from scratch on the built-in corpus.

Its trained weights are committed in `builtin_weights/` so that a demo starts from a target that had an hour of training.
`train_builtin_target` is the recipe that made them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from deepspec.data.chat import render_conversation

WEIGHTS = Path(__file__).with_name("builtin_weights")


def builtin_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """A Qwen3 of 4.7 M parameters: 6 layers, hidden 256, 4 query and 2 key/value heads of 64."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def pack_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[list[dict]], length: int
) -> Dataset:
    """Concatenate rendered conversations into rows of `length` tokens (the rest is dropped)."""
    stream: list[int] = []
    for messages in conversations:
        stream += [*render_conversation(tokenizer, messages).input_ids, tokenizer.pad_token_id]
    rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


def train_builtin_target(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    folder: Path,
    *,
    steps: int = 1800,
    batch_size: int = 16,
    length: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
    save_steps: int = 200,
) -> Qwen3ForCausalLM:
    """Train on `corpus/train.jsonl` for `steps` batches of `batch_size` x `length` tokens; save into `folder`.

    Restartable: a run that was cut off goes on from its newest checkpoint under `folder/checkpoints`.
    Weights are saved in bfloat16; load with `dtype=torch.float32` to compute in float32.
    """
    with (corpus / "train.jsonl").open(encoding="utf-8") as file:
        rows = pack_conversations(tokenizer, (json.loads(line)["messages"] for line in file), length)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(builtin_config(tokenizer))
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 25),
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=20,
        save_steps=save_steps,
        save_total_limit=1,
        seed=seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir) if folder.exists() else None)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
