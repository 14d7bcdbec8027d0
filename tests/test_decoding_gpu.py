"""Decoding on a GPU: CUDA graphs change nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDENS
from decoding_world import random_target

from deepspec import load_draft
from deepspec.decoding import Request, SpeculativeEngine, proposer_of
from deepspec.decoding.policies import ConfidenceThreshold
from deepspec.targets import load_target

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", params=["dspark_vanilla", "eagle3"])
def pair(request):
    target = load_target(str(GOLDENS / "target"), device=torch.device("cuda"))
    return target, load_draft(GOLDENS / f"ckpt_{request.param}", device="cuda")


def requests_of(vocab: int, temperature: float) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [
        Request(torch.randint(0, vocab, (3 + 4 * i,), generator=generator).tolist(), 30, temperature, seed=i)
        for i in range(9)
    ]


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_change_nothing(pair, temperature, threshold):
    target, draft = pair
    if threshold is not None and draft.confidence_head is None:
        pytest.skip("a threshold needs confidences")
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


def test_allocation_on_the_device():
    target = random_target()
    target.model.cuda()
    assert SpeculativeEngine(target, max_length=32).generate([Request([1, 2], 5)])[0].finish_reason == "length"
