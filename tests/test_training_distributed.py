"""Two ranks on the CPU, launched as a user launches them: DDP and DeepSpeed ZeRO-2 against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_world import draft_weights, tiny_run

import deepspec
from deepspec.checkpoints import checkpoint_folder, verify_checkpoint
from deepspec.config import ConfigError
from deepspec.targets import load_target
from deepspec.training import train
from deepspec.training.log import read_metrics

pytestmark = pytest.mark.usefixtures("in_temporary_folder")
TESTS = Path(__file__).parent
ACCELERATE_CONFIGS = TESTS.parent / "configs" / "accelerate"


@pytest.fixture(scope="module")
def one_process(training_world, in_temporary_folder, tmp_path_factory):
    return train(tiny_run(training_world, tmp_path_factory.mktemp("one"))).checkpoint.parents[1]


def launch(config, world, folder):
    """`accelerate launch` the driver; returns OUTPUT and what rank 0 and 1 printed."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIGS / config)]
    command += ["--main_process_port", "0", str(TESTS / "training_driver.py"), str(world), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def ddp(training_world, tmp_path_factory):
    return launch("ddp_cpu.yaml", training_world, tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def zero2(training_world, tmp_path_factory):
    pytest.importorskip("deepspeed")
    return launch("zero2_cpu.yaml", training_world, tmp_path_factory.mktemp("zero2"))


def largest_difference(run, other):
    ours, theirs = deepspec.load_draft(run), deepspec.load_draft(other)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def compare_metrics(run, other, tolerance):
    """All but the timings; both runs logged every step."""
    ours, theirs = read_metrics(run), read_metrics(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        for name in a.keys() - {"tokens_per_second", "step_seconds", "peak_memory_gib"}:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (name, a["step"])


def test_ddp_equals_one_process(ddp, one_process):
    folder, printed = ddp
    assert "2 x cpu (MULTI_CPU)" in printed
    assert printed.count("finished at step 6") == 2, "only rank 0 reports"
    compare_metrics(folder / "whole", one_process, 1e-5)
    assert largest_difference(folder / "whole", one_process) < 1e-5
    state = verify_checkpoint(checkpoint_folder(folder / "whole", 6))
    assert (state["world_size"], state["distributed_type"]) == (2, "MULTI_CPU")
    assert {"state/random_states_0.pkl", "state/random_states_1.pkl"} <= state["files"].keys()


def test_ddp_resumes_exactly(ddp):
    folder, printed = ddp
    assert "step-00000004: 2 of 6 steps" in printed
    assert draft_weights(checkpoint_folder(folder / "whole", 6)) == draft_weights(
        checkpoint_folder(folder / "resumed", 6)
    )


def test_ddp_checkpoint_continues_in_one_process(ddp, training_world, one_process, tmp_path):
    folder, _ = ddp
    config = tiny_run(training_world, tmp_path, resume=str(checkpoint_folder(folder / "whole", 4)))
    train(config)
    assert largest_difference(tmp_path, one_process) < 1e-5


def test_zero2_equals_one_process(zero2, one_process, training_world):
    folder, printed = zero2
    assert "2 x cpu (DEEPSPEED)" in printed
    compare_metrics(folder / "whole", one_process, 1e-4)
    assert largest_difference(folder / "whole", one_process) < 1e-4
    target = load_target(str(training_world / "target"))
    draft = deepspec.load_draft(folder / "whole", target=target)
    assert torch.equal(draft.lm_head.weight, target.head_weight)


def test_zero2_resumes(zero2):
    folder, printed = zero2
    assert "step-00000004: 2 of 6 steps" in printed
    assert largest_difference(folder / "whole", folder / "resumed") < 1e-6
    compare_metrics(folder / "whole", folder / "resumed", 1e-6)


def test_zero2_stores_no_frozen_weight_in_the_state(zero2):
    """Embedding and head are in the draft's own file alone."""
    folder, _ = zero2
    checkpoint = checkpoint_folder(folder / "whole", 6)
    stored = torch.load(next(checkpoint.glob("state/**/*model_states.pt")), weights_only=False)["module"]
    assert stored
    assert not [name for name in stored if "embed_tokens" in name or "lm_head" in name]
    names = verify_checkpoint(checkpoint)["files"]
    assert sum("optim_states" in name for name in names) == 2


def test_zero2_checkpoint_is_refused_elsewhere(zero2, training_world, tmp_path):
    folder, _ = zero2
    config = tiny_run(training_world, tmp_path, resume=str(checkpoint_folder(folder / "whole", 4)))
    with pytest.raises(ConfigError, match=r"was written by DEEPSPEED on 2 ranks, and this is NO on 1"):
        train(config)
