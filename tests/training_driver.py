"""Run by `accelerate launch` in tests, with work to do one after the other in the same launch:

    training_driver.py WORLD OUTPUT WORK...

    X.yaml      from here on with the DeepSpeed settings of this accelerate config, in OUTPUT/X
    whole       train in OUTPUT/X/whole
    resumed     throw the last checkpoint of a copy of it away and train on from the one before, in OUTPUT/X/resumed
    killed      train, or continue, in OUTPUT/X/killed
    die         the same, but rank 1 kills itself after step 5
    CHECKPOINT  train on from this checkpoint of another launcher in OUTPUT/X/moved

Each rank packs its samples within a token budget: some steps have one micro-batch, others two.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import yaml
from training_world import changed, tiny_run

from deepspec.checkpoints import checkpoint_folder
from deepspec.config import TrainRun
from deepspec.training import devices, train
from deepspec.training.report import Reporter
from deepspec.training.trainer import Trainer


def main() -> None:
    world = Path(sys.argv[1])
    for work in sys.argv[3:]:
        if work.endswith(".yaml"):
            use_deepspeed_settings(Path(work))
            output = Path(sys.argv[2]) / Path(work).stem
            continue
        if work == "resumed" and os.environ["RANK"] == "0":
            shutil.copytree(output / "whole", output / "resumed")
            shutil.rmtree(checkpoint_folder(output / "resumed", 6))
        if work == "die":
            die_after_step_5()
        folder = {"die": "killed"}.get(work, work if "/" not in work else "moved")
        resume = work if folder == "moved" else "auto"
        result = train(small_run(world, output / folder, resume=resume, tokens_per_batch=64))
        assert (result.status, result.step) == ("finished", 6)


def small_run(world: Path, folder: Path, **train_settings: str) -> TrainRun:
    """With 5 samples to evaluate, for which two ranks need 2 passes and 1."""
    config = tiny_run(world, folder, **train_settings)
    return changed(config, data={"eval_files": config.data.train_files, "eval_samples": 5})


def use_deepspeed_settings(file: Path) -> None:
    """As `accelerate launch --config_file` hands them over; saves a launch for each file."""
    settings = {"offload_optimizer_device": "none"} | yaml.safe_load(file.read_text()).get("deepspeed_config", {})
    for name, value in settings.items():
        os.environ[f"ACCELERATE_DEEPSPEED_{name.upper()}"] = str(value)


def let_go_at_once() -> None:
    """ZeRO-3 would keep a draft as small as this one whole once it has gathered it."""
    plugin = devices._deepspeed_plugin

    def plugin_that_lets_go(*args):
        made = plugin(*args)
        made.deepspeed_config["zero_optimization"]["stage3_max_reuse_distance"] = 0
        return made

    devices._deepspeed_plugin = plugin_that_lets_go


def die_after_step_5() -> None:
    step = Reporter.step

    def dying_step(self, done, loss, row):
        step(self, done, loss, row)
        if done == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.step = dying_step


def check_partition() -> None:
    run = Trainer.run

    def checked_run(self, reporter):
        is_cut = any(parameter.numel() == 0 for parameter in self.parameters)
        assert is_cut == (devices.zero_stage(self.accelerator) == 3), "ZeRO-3 cuts the draft over the ranks"
        return run(self, reporter)

    Trainer.run = checked_run


if __name__ == "__main__":
    check_partition()
    let_go_at_once()
    main()
