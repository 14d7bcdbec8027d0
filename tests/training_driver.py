"""Run by `accelerate launch` in tests: train, throw the last checkpoint away, and train on from the one before.

training_driver.py WORLD OUTPUT
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from training_world import tiny_run

from deepspec.checkpoints import checkpoint_folder
from deepspec.training import train

world, output = Path(sys.argv[1]), Path(sys.argv[2])
whole = train(tiny_run(world, output / "whole", micro_batch_size=1))
if os.environ.get("RANK", "0") == "0":
    shutil.copytree(output / "whole", output / "resumed")
    shutil.rmtree(checkpoint_folder(output / "resumed", 6))
resumed = train(tiny_run(world, output / "resumed", micro_batch_size=1))
assert (whole.status, resumed.status, resumed.step) == ("finished", "finished", 6)
