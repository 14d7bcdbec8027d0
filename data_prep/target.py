"""Train, or verify, the built-in target: `python -m data_prep.target [folder=...] [corpus=...] [steps=1600]`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich import print

from deepspec.arguments import run_command
from deepspec.targets import BUILTIN_WEIGHTS
from deepspec.targets.builtin import (
    RECIPE_FILE,
    TargetRecipe,
    held_out_loss,
    is_valid_target,
    load_builtin,
    train_builtin_target,
)

LARGEST_LOSS_DRIFT = 0.3  # nats; another Python version holds a slightly different corpus


@dataclass
class TargetOptions:
    """A small Qwen3 trained on the corpus. A folder with finished weights is verified and kept; else it is trained."""

    folder: str = str(BUILTIN_WEIGHTS)
    corpus: str = "outputs/corpus"
    steps: int = TargetRecipe.steps
    seed: int = TargetRecipe.seed


def main(options: TargetOptions) -> None:
    folder, corpus = Path(options.folder), Path(options.corpus)
    if not is_valid_target(folder):
        print(f"target: {folder} holds no finished weights, training {options.steps} steps")
        train_builtin_target(folder, corpus, TargetRecipe(steps=options.steps, seed=options.seed))
    record = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    loss = held_out_loss(*load_builtin(folder), corpus)
    if loss > record["held_out_loss"] + LARGEST_LOSS_DRIFT:
        raise ValueError(
            f"{folder}: held-out loss {loss:.3f} nats per token, recorded {record['held_out_loss']:.3f}; the weights "
            "and this corpus do not belong together: delete the folder's files to train it again"
        )
    print(f"target: {folder} is valid, {record['parameters'] / 1e6:.1f} M parameters, held-out loss {loss:.3f}")


if __name__ == "__main__":
    run_command(main, TargetOptions)
