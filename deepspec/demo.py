"""The whole idea end to end on a laptop: `make demo`, or `python -m deepspec.demo [output_dir=outputs/demo]`.

Each stage is a command that anyone can type by itself; the demo prints it and runs it. A stage whose output is valid
finishes at once, so a second run, or one after an interruption, goes on where the work is.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from deepspec.arguments import run_command

console = Console()
ROOT = Path(__file__).resolve().parent.parent
DRAFTS = {"DSpark": "smoke", "DFlash": "smoke_dflash"}


@dataclass
class DemoOptions:
    """Corpus, tokenizer, target, two drafts, evaluation, report, model card."""

    output_dir: str = "outputs/demo"
    size: str = "laptop"  # laptop (about ten minutes) or ci (same stages, fewer steps and prompts)


@dataclass(frozen=True)
class Stage:
    title: str
    command: list[str]


def stages(options: DemoOptions) -> list[Stage]:
    out = options.output_dir
    small = options.size == "ci"
    train_overrides = ["train.steps=30", "train.save_steps=15", "train.eval_steps=30"] if small else []
    eval_overrides = ["eval.limit=4", "decode.max_new_tokens=32"] if small else []
    python = [sys.executable]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    plan = [
        Stage("Corpus", [*python, "-m", "data_prep.corpus"]),
        Stage("Tokenizer", [*python, "-m", "data_prep.tokenizer"]),
        Stage("Target", [*python, "-m", "data_prep.target"]),
    ]
    for name, recipe in DRAFTS.items():
        command = [*launch, "train.py", f"recipes={recipe}", f"output_dir={out}/{recipe}", *train_overrides]
        plan.append(Stage(f"Distil {name}", command))
    for name, recipe in DRAFTS.items():
        command = [*launch, "eval.py", f"checkpoint={out}/{recipe}", f"output_dir={out}/eval_{recipe}", *eval_overrides]
        plan.append(Stage(f"Evaluate {name}", command))
    report = [*python, "-m", "deepspec.evaluation.report", f"{out}/report"]
    for name, recipe in DRAFTS.items():
        report += ["--train", f"{name}={out}/{recipe}", "--eval", f"{name}={out}/eval_{recipe}"]
    plan.append(Stage("Report", report))
    publish = [*python, "-m", "deepspec.publishing", "push", f"checkpoint={out}/smoke", f"evaluation={out}/eval_smoke"]
    publish += ["repo_id=me/my-first-draft", "dry_run=true", f"output_dir={out}/hub"]
    plan.append(Stage("Model card", publish))
    return plan


def run_stage(stage: Stage, environment: dict[str, str]) -> tuple[float, float]:
    """Run a stage's command. Returns wall seconds and the peak memory of its process tree in GiB.

    Raises:
        SystemExit: the command failed; running the demo again goes on from there.
    """
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(stage.command, cwd=ROOT, env=environment)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.5)
    if process.returncode:
        console.print(f"[red]stage '{stage.title}' failed[/] (status {process.returncode}); finished stages are kept")
        raise SystemExit(process.returncode)
    return time.monotonic() - started, peak / 2**30


def tree_memory(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def main(options: DemoOptions) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    total, peak = 0.0, 0.0
    for stage in stages(options):
        console.rule(f"[bold]{stage.title}")
        console.print("$ " + shlex.join(stage.command).replace(sys.executable, "python"), style="dim", highlight=False)
        seconds, memory = run_stage(stage, environment)
        console.print(f"{stage.title}: {seconds:.0f} s, {memory:.1f} GiB", style="green")
        total, peak = total + seconds, max(peak, memory)
    console.rule()
    console.print(f"Done in {total / 60:.1f} minutes, at most {peak:.1f} GiB of memory.")
    console.print(f"Report: {options.output_dir}/report/report.md")
    console.print(f"Model card: {options.output_dir}/hub/README.md")


if __name__ == "__main__":
    run_command(main, DemoOptions)
