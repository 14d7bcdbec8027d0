"""Measure a draft model: `accelerate launch eval.py checkpoint=FOLDER [key=value ...]`."""

from deepspec.cli import run_hydra
from deepspec.config import EvalRun


def main(run: EvalRun) -> None:
    from deepspec.evaluation import evaluate

    evaluate(run)


if __name__ == "__main__":
    run_hydra(main, "eval", EvalRun)
