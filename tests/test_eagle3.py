"""Eagle3: what a chain sees, packed rows, its attention against its meaning, decoding against training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_draft_config, tiny_target_config, token_batch
from decoding_world import generated, random_draft, random_target
from lossless_world import ACCEPTABLE, BLOCK, engine_of, p_values, sampled
from lossless_world import tiny_target as lossless_target
from torch import Tensor

from deepspec import load_draft
from deepspec.config import ConfigError
from deepspec.data.packing import Sample
from deepspec.decoding import Eagle3Proposer, Request, SpeculativeEngine, proposer_of
from deepspec.decoding.policies import ConfidenceThreshold, FixedLength
from deepspec.decoding.sampling import SamplingSettings
from deepspec.decoding.span import Span
from deepspec.drafts import DraftSettings, Eagle3Model, build_draft, default_layer_ids, engine_limits
from deepspec.kernels.attention import ContextSpans
from deepspec.kernels.chain_attention import chain_attention, chain_attention_flex, chain_attention_masked
from deepspec.targets import Target
from deepspec.training.batches import MicroBatchMaker

EAGLE3: dict[str, Any] = {
    "algorithm": "eagle3",
    "architecture": "Qwen3Eagle3Model",
    "num_layers": 1,
    "mask_token_id": None,
    "markov_rank": 0,
    "confidence_head": False,
    "confidence_head_with_markov": False,
    "ttt_length": 4,
}
SHAPES = ("Qwen3Eagle3Model", "LlamaEagle3Model")


def eagle3_draft(target: Target, **changes: Any) -> Eagle3Model:
    draft = random_draft(target, **(EAGLE3 | changes))
    assert isinstance(draft, Eagle3Model)
    return draft


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def documents(*lengths: int) -> list[Sample]:
    """The first three tokens of each are its prompt."""
    generator = torch.Generator().manual_seed(3)
    return [
        Sample(
            index,
            0,
            str(index),
            torch.randint(0, 60, (length,), generator=generator).tolist(),
            [0] * 3 + [1] * (length - 3),
        )
        for index, length in enumerate(lengths)
    ]


def chain_hidden(
    draft: Eagle3Model, target: Target, samples: list[Sample], *, packed: bool
) -> dict[tuple[int, int], Tensor]:
    """The supervised states of every document: {(document, place of the slot): [hidden]}."""
    maker = MicroBatchMaker(0, packed, None, draft.draft_length, 4.0, seed=0, earliest_anchor=1)
    batch = maker(samples)
    features = target.features(batch.tokens, draft.target_layer_ids)
    blocks = batch.blocks
    hidden = draft(
        batch.tokens.input_ids,
        batch.tokens.position_ids,
        features.context,
        blocks["anchor_columns"],
        blocks["block_mask"],
    ).flatten(0, 2)
    found = {}
    for slot in blocks["slots"].tolist():
        row, rest = divmod(slot, blocks["anchor_columns"].shape[1] * draft.draft_length)
        block, step = divmod(rest, draft.draft_length)
        column = int(blocks["anchor_columns"][row, block])
        document = next(d for d in batch.tokens.documents if d.row == row and d.start <= column < d.start + d.length)
        found[document.index, (column - document.start) * draft.draft_length + step] = hidden[slot]
    return found


@pytest.mark.parametrize("architecture", SHAPES)
def test_packed_rows_are_what_padded_ones_are(target: Target, architecture: str) -> None:
    draft = eagle3_draft(target, architecture=architecture)
    samples = documents(14, 9, 11)
    packed = chain_hidden(draft, target, samples, packed=True)
    padded = chain_hidden(draft, target, samples, packed=False)
    assert packed.keys() == padded.keys()
    for key, state in packed.items():
        torch.testing.assert_close(state, padded[key], rtol=1e-4, atol=1e-5)


def test_labels_stop_at_the_end_of_a_document_and_of_an_answer() -> None:
    samples = documents(9, 8)
    samples[0].loss_mask[6] = 0
    batch = MicroBatchMaker(0, True, None, 4, 4.0, seed=0, earliest_anchor=1)(samples)
    slots, anchors = batch.blocks["slots"], batch.blocks["anchor_columns"][0]
    supervised = sorted({(int(anchors[slot // 4]), int(anchors[slot // 4] + 1 + slot % 4)) for slot in slots.tolist()})
    first = [(3, 4), (3, 5), (4, 5), (7, 8)]  # the answer has a gap at 6 and ends with the document at 8
    second = [(9 + a, 9 + k) for a in range(3, 8) for k in range(a + 1, min(a + 5, 8))]
    assert supervised == sorted(first + second)
    assert torch.equal(batch.blocks["targets"], batch.tokens.input_ids[0, anchors[slots // 4] + 1 + slots % 4])


def test_no_chain_starts_where_no_state_is_before_it() -> None:
    sample = Sample(0, 0, "all", [1, 2, 3, 4], [1] * 4)
    anchors = MicroBatchMaker(0, True, None, 2, 4.0, seed=0, earliest_anchor=1)([sample]).blocks["anchor_columns"]
    assert anchors.tolist() == [[1, 2]]


def test_a_chain_sees_the_past_alone(target: Target) -> None:
    draft = eagle3_draft(target)
    ids = token_batch(torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(0)))
    features = torch.randn(1, 12, 3 * target.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    anchors = torch.tensor([[6]])
    states = draft.chain_states(ids.input_ids, ids.position_ids, features, anchors, torch.ones_like(anchors).bool())
    states.sum().backward()
    assert features.grad is not None
    reached = features.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 6 + [False] * 6  # h_0 .. h_5, the anchor is token 6


def attention_inputs(steps: int) -> tuple[Tensor, ...]:
    """Two rows, 7 chains of which one sees nothing, 9 columns, 4 heads over 2 key/value heads of 8."""
    generator = torch.Generator().manual_seed(steps)
    shapes = [(2, 4, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 2, 7, steps, 8), (2, 2, 7, steps, 8)]
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


SPANS = ContextSpans(torch.tensor([[0, 0, 0, 3, 3, 3, 3]] * 2), torch.tensor([[0, 1, 2, 3, 4, 7, 9]] * 2))


@pytest.mark.parametrize("steps", [1, 3])
def test_attention_and_its_gradients(steps: int) -> None:
    inputs, results = attention_inputs(steps), []
    for attend in (chain_attention_masked, chain_attention):
        attended = attend(*inputs, SPANS, 0.3)
        upstream = torch.randn(attended.shape, generator=torch.Generator().manual_seed(9))
        results.append((attended, *torch.autograd.grad(attended, inputs, upstream)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_attention_of_a_gpu_and_of_decoding(steps: int) -> None:
    inputs = tuple(tensor.detach() for tensor in attention_inputs(steps))
    expected = chain_attention_masked(*inputs, SPANS, 0.3)
    torch.testing.assert_close(chain_attention_flex(*inputs, SPANS, 0.3), expected, rtol=1e-4, atol=1e-5)
    query, keys, values, own_keys, own_values = inputs
    for chain in range(7):
        one = slice(chain, chain + 1)
        spans = ContextSpans(SPANS.first[:, one], SPANS.last[:, one])
        found = chain_attention(query[:, :, one], keys, values, own_keys[:, :, one], own_values[:, :, one], spans, 0.3)
        torch.testing.assert_close(found, expected[:, :, one], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("steps", [1, 3])
def test_attention_and_its_gradients_on_a_gpu(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    shapes = [(2, 4, 200, 32), (2, 2, 200, 32), (2, 2, 200, 32), (2, 2, 200, steps, 32), (2, 2, 200, steps, 32)]
    inputs = [torch.randn(shape, generator=generator).cuda().requires_grad_() for shape in shapes]
    columns = torch.arange(200).expand(2, -1).cuda()
    spans = ContextSpans(torch.where(columns < 90, 0, 90), columns)  # two documents, whose first chains see nothing
    results = []
    for attend in (chain_attention_masked, chain_attention_flex):
        attended = attend(*inputs, spans, 0.2)
        upstream = torch.randn(attended.shape, generator=torch.Generator().manual_seed(9)).cuda()
        results.append((attended, *torch.autograd.grad(attended, inputs, upstream)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("architecture", SHAPES)
def test_greedy_text_is_the_targets_own(target: Target, architecture: str, graphs: bool) -> None:
    """More requests than slots, of different lengths, so that slots move and free."""
    draft = eagle3_draft(target, architecture=architecture)
    prompts = [[5, 9, 2, 30], [7], list(range(11)), [1, 2], [40, 3, 3]]
    engine = SpeculativeEngine(target, proposer_of(draft, target), slots=3, max_length=64, graphs=graphs)
    lengths = (20, 7, 13, 16, 9)
    found = engine.generate([Request(p, n) for p, n in zip(prompts, lengths, strict=True)])
    for prompt, length, completion in zip(prompts, lengths, found, strict=True):
        assert completion.output_ids == generated(target, prompt, length)


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.8}])
def test_sampling_is_lossless(sampling: dict[str, Any]) -> None:
    draft = random_draft(lossless_target(), **(EAGLE3 | {"ttt_length": BLOCK, "target_layer_ids": (0, 1)}), scale=0.5)
    assert min(p_values(sampled(engine_of(proposer_of(draft, lossless_target())), sampling), sampling)) > ACCEPTABLE


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_a_vocabulary_of_its_own(target: Target, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = eagle3_draft(target, draft_vocab_size=20)
    draft.keep_tokens(torch.arange(1, 60, 3))
    draft.tie_to_target(target)
    proposer = Eagle3Proposer(draft, target)
    proposed: list[int] = []
    propose = proposer.propose

    def remember(*args: Any) -> Any:
        proposal = propose(*args)
        proposed.extend(proposal.tokens.flatten().tolist())
        return proposal

    monkeypatch.setattr(proposer, "propose", remember)
    engine = SpeculativeEngine(target, proposer, max_length=64)
    request = Request([5, 9, 2], 20, repetition_penalty=penalty)
    expected = generated(target, [5, 9, 2], 20, repetition_penalty=penalty)
    assert engine.generate([request])[0].output_ids == expected
    assert {token % 3 for token in proposed} == {1}


def test_sampling_with_a_vocabulary_of_its_own_is_lossless() -> None:
    settings = EAGLE3 | {"ttt_length": BLOCK, "target_layer_ids": (0, 1), "draft_vocab_size": 4}
    draft = random_draft(lossless_target(), **settings, scale=0.5)
    draft.keep_tokens(torch.tensor([0, 2, 3, 5]))
    draft.tie_to_target(lossless_target())
    sampling = {"temperature": 1.0}
    assert min(p_values(sampled(engine_of(proposer_of(draft, lossless_target())), sampling), sampling)) > ACCEPTABLE


def test_decoding_makes_the_states_of_training(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the drafted tokens are the text itself; after a verify pass whose tokens were rejected."""
    draft = eagle3_draft(target)
    ids = torch.randint(0, 60, (1, 14), generator=torch.Generator().manual_seed(4))
    batch = token_batch(ids)
    features = target.features(batch, draft.target_layer_ids)
    anchor = 8
    anchors = torch.tensor([[anchor]])
    expected = draft.chain_states(ids, batch.position_ids, features.context, anchors, torch.ones_like(anchors).bool())
    proposer = Eagle3Proposer(draft, target)
    proposer.allocate(2, 20)
    slot = 0
    for start, tokens, states in (
        (0, ids[0, :6], features.context[0, :6]),  # the prompt
        (6, torch.tensor([int(ids[0, 6]), int(ids[0, 7]), 1, 2]), torch.randn(4, features.context.shape[-1])),  # 2 kept
    ):
        states = states.clone()
        states[: anchor - start] = features.context[0, start : start + len(states)][: anchor - start]
        proposer.observe(Span.of([slot], [start], [len(tokens)], target.device), tokens, states)
    true_tokens = iter(ids[0, anchor + 1 :])
    steps: list[Tensor] = []
    step = draft.step

    def remember(*args: Any) -> Any:
        state, own = step(*args)
        steps.append(state[0, 0])
        return state, own

    monkeypatch.setattr(draft, "step", remember)
    monkeypatch.setattr("deepspec.decoding.chain.draw", lambda *_: (next(true_tokens).view(1, 1), None))
    settings = SamplingSettings.of_requests([Request([0], 1)], target.vocab_size, target.device)
    with torch.inference_mode():
        proposal = proposer.propose(ids[0, anchor : anchor + 1], torch.tensor([anchor]), 12, settings, None, 4)
    assert torch.equal(proposal.tokens[0], ids[0, anchor + 1 : anchor + 5])
    torch.testing.assert_close(torch.stack(steps), expected[0, 0], rtol=1e-4, atol=1e-5)


def test_a_policy_may_leave_a_round_without_a_draft(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the next round's chain must still see the token in between."""
    draft = eagle3_draft(target)
    policy = FixedLength(4, target.device)
    every_other = iter([4, 0] * 40)
    monkeypatch.setattr(policy, "to_draft", lambda _: next(every_other))
    engine = SpeculativeEngine(target, proposer_of(draft, target), max_length=64, policy=policy)
    assert engine.generate([Request([5, 9, 2], 24)])[0].output_ids == generated(target, [5, 9, 2], 24)


def test_a_threshold_needs_confidences(target: Target) -> None:
    proposer = proposer_of(eagle3_draft(target), target)
    with pytest.raises(ConfigError, match="no confidence head"):
        SpeculativeEngine(target, proposer, max_length=64, policy=ConfidenceThreshold(0.5, 4))


@pytest.mark.parametrize("architecture", SHAPES)
def test_round_trip_on_disk(target: Target, architecture: str, tmp_path: Path) -> None:
    draft = eagle3_draft(target, architecture=architecture)
    draft.save_pretrained(tmp_path)
    loaded = load_draft(tmp_path, target=target)
    assert type(loaded).__name__ == architecture
    assert (loaded.algorithm, loaded.draft_length) == ("eagle3", 4)
    assert {name: tensor.tolist() for name, tensor in loaded.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in draft.state_dict().items()
    }
    assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    norms = {name for name in loaded.state_dict() if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert bool(norms) == (architecture == "Qwen3Eagle3Model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "draft.num_layers=2: with draft.algorithm=eagle3 it can only be 1"),
        ({"architecture": "Qwen3DSparkModel"}, "only be Qwen3Eagle3Model or LlamaEagle3Model"),
        ({"sliding_window": 8}, "draft.sliding_window=8: with draft.algorithm=eagle3 it can only be null"),
        ({"markov_rank": 4}, "draft.algorithm=eagle3 has no heads"),
        ({"ttt_length": 0}, "draft.ttt_length=0: must be at least 1"),
        ({"algorithm": "dspark", "mask_token_id": 3}, "draft.architecture=Qwen3Eagle3Model: must be one of"),
    ],
)
def test_impossible_drafts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_draft_config(**(EAGLE3 | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttt_length": None}, "not the config of an Eagle3 draft: ttt_length missing"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2"),
        ({"norm_output": True}, "norm_output=true: DeepSpec has no such Eagle3 draft"),
    ],
)
def test_configs_of_others(changes: dict[str, Any], message: str) -> None:
    config = tiny_draft_config(**EAGLE3)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ConfigError, match=message):
        DraftSettings.of(config)


def test_defaults() -> None:
    assert default_layer_ids(36, "eagle3") == [1, 9, 17, 25, 33]
    assert [default_layer_ids(depth, "eagle3") for depth in (6, 4, 2, 1)] == [[0, 1, 2, 3, 4], [0, 1, 2], [0], [-1]]
    assert len(engine_limits(tiny_draft_config(**EAGLE3))) == 1
    assert engine_limits(tiny_draft_config(**(EAGLE3 | {"architecture": "LlamaEagle3Model"}))) == []


def test_it_does_not_start_from_the_target(target: Target) -> None:
    draft = build_draft(tiny_draft_config(tiny_target_config(), **EAGLE3))
    with pytest.raises(ConfigError, match=r"draft.start_from_target=true: an Eagle3 layer reads"):
        draft.start_from_target(target)
