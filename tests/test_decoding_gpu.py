"""Decoding on a GPU: CUDA graphs change nothing."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import GOLDENS
from decoding_world import random_target

from deepspec import load_draft
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine, proposer_of
from deepspec.decoding.policies import ConfidenceThreshold
from deepspec.targets import load_target

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair():
    target = load_target(str(GOLDENS / "target"), device=torch.device("cuda"))
    return target, load_draft(GOLDENS / "ckpt_dspark_vanilla", device="cuda")


def requests_of(vocab: int, temperature: float) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [
        Request(torch.randint(0, vocab, (3 + 4 * i,), generator=generator).tolist(), 30, temperature, seed=i)
        for i in range(9)
    ]


@pytest.mark.parametrize(
    ("name", "threshold"), [("dspark_vanilla", None), ("dspark_vanilla", 0.5), ("dflash", None), ("eagle3", None)]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_change_nothing(pair, name, temperature, threshold):
    target, draft = pair[0], load_draft(GOLDENS / f"ckpt_{name}", device="cuda")
    requests = requests_of(target.vocab_size, temperature)
    outputs = []
    for graphs in (False, True):
        policy = None if threshold is None else ConfidenceThreshold(threshold, draft.draft_length)
        engine = SpeculativeEngine(
            target, proposer_of(draft, target), slots=5, max_length=96, policy=policy, graphs=graphs
        )
        outputs.append([completion.output_ids for completion in engine.generate(requests)])
    assert outputs[0] == outputs[1]
    if temperature == 0:
        plain = SpeculativeEngine(target, slots=5, max_length=96).generate(requests)
        assert outputs[0] == [completion.output_ids for completion in plain]


def test_graphs_of_an_engine_that_is_garbage_do_not_spoil_a_capture(pair):
    """Such an engine is a cycle, which Python collects whenever it likes."""
    target, draft = pair
    outputs = []
    before = gc.get_threshold()
    try:
        for _ in range(2):
            engine = SpeculativeEngine(target, DSparkProposer(draft, target), slots=1, max_length=96)
            engine.myself = engine
            outputs.append(engine.generate(requests_of(target.vocab_size, 0.0)[:1])[0].output_ids)
            del engine
            gc.set_threshold(1)
    finally:
        gc.set_threshold(*before)
    assert outputs[0] == outputs[1]


def test_allocation_on_the_device():
    target = random_target()
    target.model.cuda()
    assert SpeculativeEngine(target, max_length=32).generate([Request([1, 2], 5)])[0].finish_reason == "length"
