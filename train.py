"""Train a draft model: `accelerate launch train.py [recipes=NAME] [key=value ...]`."""

from deepspec.cli import run_hydra
from deepspec.config import TrainRun


def main(run: TrainRun) -> None:
    from deepspec.training import train

    train(run)


if __name__ == "__main__":
    run_hydra(main, "train", TrainRun)
