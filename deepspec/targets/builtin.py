"""The built-in target: a small Qwen3 language model trained from scratch on the built-in corpus.

Its trained weights are committed in `builtin_weights/`, so that a demo starts from a target that had an hour of
training. `train_builtin_target` is the recipe that made them; `recipe.json` beside the weights records the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from deepspec.data.chat import render_conversation
from deepspec.data.jsonl import read_jsonl
from deepspec.files import match_digests, sha256_of, write_atomically

RECIPE_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class TargetRecipe:
    """How the built-in target is trained."""

    steps: int = 1600
    batch_size: int = 16  # rows
    length: int = 256  # tokens per row
    lr: float = 3e-3  # peak, cosine to 0
    seed: int = 0


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


def pack_conversations(tokenizer: PreTrainedTokenizerBase, file: Path, length: int) -> Dataset:
    """Concatenate the rendered conversations of a JSONL file into rows of `length` tokens, the rest dropped."""
    stream: list[int] = []
    for _, row in read_jsonl(file):
        stream += [*render_conversation(tokenizer, row["messages"]).input_ids, tokenizer.pad_token_id]
    rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Path, rows: int = 64) -> float:
    """Cross-entropy in nats per token over the first `rows` packed rows of the held-out split."""
    packed = pack_conversations(tokenizer, corpus / "heldout.jsonl", 256)[:rows]["input_ids"]
    losses = [model(input_ids=batch, labels=batch).loss for batch in torch.tensor(packed).split(16)]
    return float(torch.stack(losses).mean())


def is_valid_target(folder: Path) -> bool:
    """Whether `folder` holds a finished target: its recorded digests match the files."""
    record = folder / RECIPE_FILE
    if not record.is_file():
        return False
    return match_digests(folder, json.loads(record.read_text(encoding="utf-8"))["sha256"])


def load_builtin(folder: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer."""
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def train_builtin_target(folder: Path, corpus: Path, recipe: TargetRecipe, save_steps: int = 200) -> None:
    """Train on `corpus/train.jsonl` with the tokenizer in `folder`, and save there.

    Restartable: a run that was cut off goes on from its newest checkpoint under `folder/checkpoints`. Weights are saved
    in bfloat16 (half the bytes); they are loaded and used in float32.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pack_conversations(tokenizer, corpus / "train.jsonl", recipe.length)
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(builtin_config(tokenizer))
    checkpoints = folder / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, recipe.steps // 25),
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=20,
        save_steps=save_steps,
        save_total_limit=1,
        seed=recipe.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    finish_target(folder, corpus, recipe, model)


def finish_target(folder: Path, corpus: Path, recipe: TargetRecipe, model: Qwen3ForCausalLM) -> None:
    """Save the trained weights and, last, the record that makes the folder valid."""
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    reloaded, tokenizer = load_builtin(folder)
    record = {
        "recipe": asdict(recipe),
        "parameters": reloaded.num_parameters(),
        "held_out_loss": held_out_loss(reloaded, tokenizer, corpus),
        "corpus": json.loads((corpus / "manifest.json").read_text(encoding="utf-8")),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": {name: sha256_of(folder / name) for name in (WEIGHTS_FILE, "config.json", "tokenizer.json")},
    }
    write_atomically(folder / RECIPE_FILE, json.dumps(record, indent=2))


def texts_of(file: Path) -> Iterable[str]:
    """Every message of a conversations file, for tokenizer training."""
    for _, row in read_jsonl(file):
        yield from (message["content"] for message in row["messages"])
