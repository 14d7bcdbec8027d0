"""Train a draft model: `accelerate launch train.py [recipes=NAME] [key=value ...]`."""

from deepspec.cli import run_hydra
from deepspec.config import TrainRun


def main(run: TrainRun) -> None:
    from deepspec.decoding import check_decodable
    from deepspec.training import train

    train(run, check_target=check_decodable)


if __name__ == "__main__":
    run_hydra(main, "train", TrainRun)
