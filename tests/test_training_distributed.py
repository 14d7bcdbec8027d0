"""Two ranks on the CPU, launched as a user launches them: DDP and DeepSpeed ZeRO against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors import safe_open
from safetensors.torch import load_file
from training_world import draft_weights, is_timing, tiny_run

import deepspec
from deepspec.checkpoints import checkpoint_folder, verify_checkpoint
from deepspec.targets import load_target
from deepspec.training import train
from deepspec.training.log import read_metrics

pytestmark = [pytest.mark.usefixtures("in_temporary_folder"), pytest.mark.timeout(600)]
TESTS = Path(__file__).parent
ACCELERATE_CONFIGS = TESTS.parent / "configs" / "accelerate"
NAMES = {
    "ddp_cpu": "DDP",
    "zero1_cpu": "DeepSpeed ZeRO-1",
    "zero2_cpu": "DeepSpeed ZeRO-2",
    "zero2_offload_cpu": "DeepSpeed ZeRO-2 with optimizer offload",
    "zero3_cpu": "DeepSpeed ZeRO-3",
}
# What is done with each, see training_driver.py. ONE stands for the checkpoint of step 4 of a single process.
WORK = {
    "ddp_cpu": ["killed", "whole"],
    "zero1_cpu": ["whole", "resumed"],
    "zero2_cpu": ["killed", "whole", "ONE"],
    "zero2_offload_cpu": ["whole", "resumed"],
    "zero3_cpu": ["whole", "resumed", "ONE"],
}


@pytest.fixture(scope="module")
def one_process(training_world, in_temporary_folder, tmp_path_factory):
    return train(tiny_run(training_world, tmp_path_factory.mktemp("one"))).checkpoint.parents[1]


@pytest.fixture(scope="module")
def ddp(training_world, tmp_path_factory, one_process):
    return killed_and_continued(["ddp_cpu"], training_world, tmp_path_factory.mktemp("ddp"), one_process)


@pytest.fixture(scope="module")
def deepspeed(training_world, tmp_path_factory, one_process):
    pytest.importorskip("deepspeed")
    configs = ["zero2_cpu", "zero1_cpu", "zero3_cpu", "zero2_offload_cpu"]
    return killed_and_continued(configs, training_world, tmp_path_factory.mktemp("deepspeed"), one_process)


def killed_and_continued(configs, world, folder, one_process):
    """The first config in a launch in which a rank dies, then all of them in a second one. Returns `folder`, output."""
    died = launch(configs[0], world, folder, [path_of(configs[0]), "die"])
    assert died.returncode != 0
    assert "SIGKILL" in died.stderr
    assert not checkpoint_folder(folder / configs[0] / "killed", 6).exists()
    work = [item for config in configs for item in (path_of(config), *WORK[config])]
    one = str(checkpoint_folder(one_process, 4))
    done = launch(configs[0], world, folder, [one if item == "ONE" else item for item in work])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def path_of(config):
    return str(ACCELERATE_CONFIGS / f"{config}.yaml")


def launch(config, world, folder, work):
    """`accelerate launch` the driver."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path_of(config)]
    command += ["--main_process_port", "0", str(TESTS / "training_driver.py"), str(world), str(folder), *work]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)


@pytest.fixture(params=NAMES)
def launched(request):
    """A config, the folder of its runs and what the launch printed."""
    folder, printed = request.getfixturevalue("ddp" if request.param == "ddp_cpu" else "deepspeed")
    return request.param, folder / request.param, printed


def largest_difference(run, other):
    ours, theirs = deepspec.load_draft(run), deepspec.load_draft(other)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def compare_metrics(run, other, tolerance):
    """All but the timings; both runs logged every step."""
    ours, theirs = read_metrics(run), read_metrics(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        for name in (name for name in a if not is_timing(name)):
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (name, a["step"])


def optimizer_state(run, step=6):
    return checkpoint_folder(run, step) / "state" / "optimizer.safetensors"


def test_equals_one_process(launched, one_process):
    config, folder, printed = launched
    assert f"2 x cpu ({NAMES[config]})" in printed
    assert printed.count(f"finished at step 6: {folder / 'whole'}") == 1, "only rank 0 reports"
    compare_metrics(folder / "whole", one_process, 1e-5)
    assert largest_difference(folder / "whole", one_process) < 1e-5


def test_optimizer_state_is_the_same_file(launched, one_process):
    """Complete and whole from every launcher, with the exact number of updates and without embedding and head."""
    _, folder, _ = launched
    ours, theirs = load_file(optimizer_state(folder / "whole")), load_file(optimizer_state(one_process))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if "embed_tokens" in name or "lm_head" in name]
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-6)
        assert value.abs().max() > 0, name
    for step in (4, 6):
        with safe_open(optimizer_state(folder / "whole", step), framework="pt") as file:
            assert file.metadata() == {"updates": str(step)}


def test_draft_keeps_the_embedding_and_head_of_the_target(launched, training_world):
    _, folder, _ = launched
    target = load_target(str(training_world / "target"))
    draft = deepspec.load_draft(folder / "whole", target=target)
    assert torch.equal(draft.lm_head.weight, target.head_weight)
    assert torch.equal(draft.embed_tokens.weight, target.embedding_weight)


def test_checkpoint_folder(launched):
    config, folder, _ = launched
    state = verify_checkpoint(checkpoint_folder(folder / "whole", 6))
    assert (state["world_size"], state["launcher"]) == (2, NAMES[config])
    assert state["files"].keys() == {
        "draft/config.json",
        "draft/model.safetensors",
        "state/optimizer.safetensors",
    }


def test_resumes_exactly(launched):
    """Killed or continued in the same launch: the same bytes as the run that was left alone."""
    config, folder, printed = launched
    again = "killed" if "killed" in WORK[config] else "resumed"
    assert f"continuing from {checkpoint_folder(folder / again, 4)}: 2 of 6 steps" in printed
    ours, theirs = checkpoint_folder(folder / "whole", 6), checkpoint_folder(folder / again, 6)
    assert draft_weights(ours) == draft_weights(theirs)
    assert optimizer_state(folder / "whole").read_bytes() == optimizer_state(folder / again).read_bytes()


def test_continues_in_one_process(launched, training_world, one_process, tmp_path, caplog):
    config, folder, _ = launched
    checkpoint = checkpoint_folder(folder / "whole", 4)
    train(tiny_run(training_world, tmp_path, resume=str(checkpoint)))
    assert largest_difference(tmp_path, one_process) < 1e-5
    assert (
        f"{checkpoint} was written by {NAMES[config]} on 2 ranks with train.tokens_per_batch=64, and this is one "
        "process on 1 rank with train.micro_batch_size=2: every step keeps its samples and anchors"
    ) in caplog.text


@pytest.mark.parametrize("config", [name for name, work in WORK.items() if "ONE" in work])
def test_continues_a_single_process(deepspeed, one_process, config):
    folder, printed = deepspeed
    assert f"was written by one process on 1 rank with train.micro_batch_size=2, and this is {NAMES[config]}" in printed
    assert largest_difference(folder / config / "moved", one_process) < 1e-5


@pytest.mark.parametrize("file", sorted(ACCELERATE_CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_every_setting(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"
    assert file.read_text().startswith("# ")


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_gpu_settings_are_those_tried_on_the_cpu(name):
    gpu, cpu = (load_config_from_file(str(ACCELERATE_CONFIGS / f"{file}.yaml")) for file in (name, f"{name}_cpu"))
    assert gpu.deepspeed_config == cpu.deepspeed_config
