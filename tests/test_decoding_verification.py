"""Verification on tensors: bounds, agreement of the rules, and exactness against ancestral sampling."""

from __future__ import annotations

import pytest
import torch
from decoding_world import g_test, warped
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.requests import Request
from deepspec.decoding.sampling import SamplingSettings, probabilities, sample
from deepspec.decoding.verification import VERIFICATION_RULES, Verdict, verify_block, verify_greedy, verify_tokens

VOCAB, SLOTS, ROWS = 5, 2, 300_000
ACCEPTABLE, REJECTED = 1e-3, 1e-6  # p-values; the random numbers are seeded, so a verdict never flickers


def random_case(seed: int, rows: int, slots: int, vocab: int, sharpness: float = 1.5):
    generator = torch.Generator().manual_seed(seed)
    draft = torch.softmax(sharpness * torch.randn(rows, slots, vocab, generator=generator), -1)
    target = torch.softmax(sharpness * torch.randn(rows, slots + 1, vocab, generator=generator), -1)
    uniform = torch.rand(rows, 2 * slots + 1, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, slots + 1, (rows,), generator=generator)
    tokens = sample(draft, uniform[:, :slots])
    return tokens, draft, target, lengths, uniform[:, slots:-1], uniform[:, -1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6), st.integers(2, 9), st.sampled_from([0.1, 1.5, 8]))
def test_bounds(seed, rows, slots, vocab, sharpness):
    case = random_case(seed, rows, slots, vocab, sharpness)
    tokens, draft, target, lengths = case[:4]
    for rule in VERIFICATION_RULES.values():
        verdict = rule(*case)
        for row in range(rows):
            kept, after, length = int(verdict.accepted[row]), int(verdict.next_token[row]), int(lengths[row])
            assert 0 <= kept <= length
            chosen = tokens[row, :kept, None]
            assert (target[row, :kept].gather(-1, chosen) > 0).all()
            assert target[row, kept, after] > 0
            if kept < length and rule is verify_tokens:  # a correction is a token that the draft underrates
                assert target[row, kept, after] > draft[row, kept, after]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6))
def test_all_rules_agree_at_temperature_zero(seed, rows, slots):
    tokens, _, _, lengths, accept, after = random_case(seed, rows, slots, 2)
    best = torch.randint(0, 2, (rows, slots + 1), generator=torch.Generator().manual_seed(seed))
    expected = verify_greedy(tokens, best, lengths)
    for row in range(rows):
        length = int(lengths[row])
        agreeing = next((i for i in range(length) if tokens[row, i] != best[row, i]), length)
        assert expected.accepted[row] == agreeing
        assert expected.next_token[row] == best[row, agreeing]
    draft = torch.nn.functional.one_hot(tokens, 2).float()
    target = torch.nn.functional.one_hot(best, 2).float()
    for rule in VERIFICATION_RULES.values():
        verdict = rule(tokens, draft, target, lengths, accept, after)
        assert torch.equal(verdict.accepted, expected.accepted)
        assert torch.equal(verdict.next_token, expected.next_token)


@pytest.mark.parametrize("rule", VERIFICATION_RULES.values(), ids=VERIFICATION_RULES)
def test_no_lengths_means_all_proposed(rule):
    tokens, draft, target, _, accept, after = random_case(5, 200, 4, 6)
    full = rule(tokens, draft, target, torch.full((200,), 4), accept, after)
    short = rule(tokens, draft, target, None, accept, after)
    assert torch.equal(full.accepted, short.accepted)
    assert torch.equal(full.next_token, short.next_token)
    assert 0 < short.accepted.float().mean() < 4


@pytest.mark.parametrize("rule", VERIFICATION_RULES.values(), ids=VERIFICATION_RULES)
def test_a_shorter_proposal_counts_as_if_the_rest_had_not_been_drafted(rule):
    tokens, draft, target, _, accept, after = random_case(6, 300, 4, 6)
    for length in range(5):
        told = rule(tokens, draft, target, torch.full((300,), length), accept, after)
        cut = rule(tokens[:, :length], draft[:, :length], target[:, : length + 1], None, accept[:, :length], after)
        assert torch.equal(told.accepted, cut.accepted)
        assert torch.equal(told.next_token, cut.next_token)


@pytest.mark.parametrize("rule", VERIFICATION_RULES.values(), ids=VERIFICATION_RULES)
def test_equal_distributions_keep_everything(rule):
    tokens, draft, target, _, accept, after = random_case(7, 500, 4, 6)
    verdict = rule(tokens, draft, torch.cat([draft, target[:, -1:]], 1), None, accept, after)
    assert verdict.accepted.eq(4).all()


def test_the_expected_acceptance_is_one_minus_the_total_variation():
    _, draft, target, *_ = random_case(8, 1, 1, 6)
    rows = 200_000
    generator = torch.Generator().manual_seed(9)
    uniform = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    tokens = sample(draft.expand(rows, -1, -1), uniform[:, :1])
    verdict = verify_tokens(
        tokens, draft.expand(rows, -1, -1), target.expand(rows, -1, -1), None, uniform[:, 1:2], uniform[:, 2]
    )
    overlap = 1 - 0.5 * (draft[0, 0] - target[0, 0]).abs().sum().item()
    assert verdict.accepted.float().mean().item() == pytest.approx(overlap, abs=0.005)


class Tables:
    """A draft and a target as tables of next-token logits after every prefix of up to two tokens."""

    def __init__(self, temperature: float, top_k: int, top_p: float):
        generator = torch.Generator().manual_seed(19)
        self.settings = (temperature, top_k, top_p)
        self.draft = [0.8 * torch.randn(VOCAB**n, VOCAB, generator=generator) for n in range(SLOTS)]
        self.target = [0.8 * torch.randn(VOCAB**n, VOCAB, generator=generator) for n in range(SLOTS + 1)]

    def distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """As the engine computes it, float32."""
        one = SamplingSettings.of_requests([Request([0], 1, *self.settings)], VOCAB, torch.device("cpu"))
        return probabilities(logits[None], one)[0]

    def exact(self, length: int) -> torch.Tensor:
        """The target's joint probability of its first `length` tokens, by the chain rule: [vocab ** length]."""
        joint = torch.ones(1, 1, dtype=torch.float64)
        for logits in self.target[:length]:
            joint = (joint.reshape(-1, 1) * warped(logits, *self.settings)).reshape(-1, 1)
        return joint.flatten()

    def decode(self, rule, *, early_stop: bool = False, rows: int = ROWS) -> torch.Tensor:
        """Draft, verify, and complete each row to three tokens from the target: outcomes [rows, 3]."""
        generator = torch.Generator().manual_seed(12)
        uniform = torch.rand(rows, 2 * SLOTS + 1 + SLOTS + 1, generator=generator, dtype=torch.float64)
        draft = [self.distribution(logits) for logits in self.draft]
        target = [self.distribution(logits) for logits in self.target]
        first = sample(draft[0].expand(rows, -1), uniform[:, 0])
        second = sample(draft[1][first], uniform[:, 1])
        tokens = torch.stack([first, second], 1)
        drawn_from = torch.stack([draft[0].expand(rows, -1), draft[1][first]], 1)
        judged_by = torch.stack([target[0].expand(rows, -1), target[1][first], target[2][first * VOCAB + second]], 1)
        # A proposal may end early, as a function of what comes before its end: here after an odd first token.
        lengths = 2 - first % 2 if early_stop else None
        verdict = rule(tokens, drawn_from, judged_by, lengths, uniform[:, 2:4], uniform[:, 4])
        emitted = torch.cat([tokens, tokens[:, :1]], 1)
        emitted.scatter_(1, verdict.accepted[:, None], verdict.next_token[:, None])
        for position in (1, 2):
            prefix = emitted[:, 0] if position == 1 else emitted[:, 0] * VOCAB + emitted[:, 1]
            completed = sample(target[position][prefix], uniform[:, 5 + position - 1])
            emitted[:, position] = torch.where(verdict.accepted < position, completed, emitted[:, position])
        return emitted

    def p_values(self, emitted: torch.Tensor) -> list[float]:
        """Of the joint distributions of the first one, two and three tokens."""
        code, values = torch.zeros(len(emitted), dtype=torch.long), []
        for length in (1, 2, 3):
            code = code * VOCAB + emitted[:, length - 1]
            values.append(g_test(code, self.exact(length)))
        return values


SETTINGS = [(1.0, 0, 1.0), (0.7, 4, 0.9)]


@pytest.mark.parametrize("early_stop", [False, True], ids=["whole", "early_stop"])
@pytest.mark.parametrize("sampling", SETTINGS, ids=["temperature_1", "temperature_0.7_top_k_top_p"])
@pytest.mark.parametrize("rule", VERIFICATION_RULES.values(), ids=VERIFICATION_RULES)
def test_output_follows_the_target_exactly(rule, sampling, early_stop):
    tables = Tables(*sampling)
    values = tables.p_values(tables.decode(rule, early_stop=early_stop))
    assert min(values) > ACCEPTABLE, values


def one_percent_shift(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Moves one percentage point of probability from the first emitted token 0 to token 1."""
    verdict = verify_tokens(tokens, draft, target, lengths, accept, after)
    chance = 0.01 / target[0, 0, 0].item()
    unlucky = torch.rand(len(tokens), generator=torch.Generator().manual_seed(13)) < chance
    first = torch.where(verdict.accepted > 0, tokens[:, 0], verdict.next_token)
    hit = unlucky & (first == 0)
    return Verdict(torch.where(hit, 0, verdict.accepted), torch.where(hit, torch.ones_like(first), verdict.next_token))


def one_percent_of_one_probability(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Judges by a target whose largest first probability is 1% too large, relatively."""
    shifted = target.clone()
    shifted[:, 0, target[0, 0].argmax()] *= 1.01
    return verify_tokens(tokens, draft, shifted / shifted.sum(-1, keepdim=True), lengths, accept, after)


def no_residual(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Corrects from the target's own distribution instead of what the draft left of it."""
    verdict = verify_tokens(tokens, draft, target, lengths, accept, after)
    return Verdict(verdict.accepted, sample(target[torch.arange(len(tokens)), verdict.accepted], after))


def accept_the_likeliest(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Keeps drafted tokens that equal the target's argmax, as if this were greedy decoding."""
    accepted = verify_greedy(tokens, target.argmax(-1), lengths).accepted
    return Verdict(accepted, sample(target[torch.arange(len(tokens)), accepted], after))


def another_draft_temperature(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Judges by other draft probabilities than those that drew the tokens."""
    other = draft.clamp(min=1e-9) ** 0.9
    return verify_tokens(tokens, other / other.sum(-1, keepdim=True), target, lengths, accept, after)


def block_keeps_one_more(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Tests every block length as if it were the last one."""
    verdict = verify_block(tokens, draft, target, lengths, accept, after)
    ratio = (target[:, :1].gather(-1, tokens[:, :1, None]) / draft[:, :1].gather(-1, tokens[:, :1, None])).flatten()
    lenient = (verdict.accepted == 0) & (accept[:, 0] < ratio)
    replaced = sample(target[:, 1], after)
    return Verdict(verdict.accepted + lenient, torch.where(lenient, replaced, verdict.next_token))


@pytest.mark.parametrize(
    ("broken", "rows"),
    [
        (one_percent_shift, ROWS),
        (one_percent_of_one_probability, 6 * ROWS),
        (no_residual, ROWS),
        (accept_the_likeliest, ROWS),
        (another_draft_temperature, ROWS),
        (block_keeps_one_more, ROWS),
    ],
)
def test_the_same_test_refuses_a_broken_rule(broken, rows):
    tables = Tables(*SETTINGS[0])
    values = tables.p_values(tables.decode(broken, rows=rows))
    assert min(values) < REJECTED, values


def test_block_verification_keeps_more_tokens_than_token_verification():
    rows = 100_000
    generator = torch.Generator().manual_seed(14)
    draft = torch.softmax(torch.randn(1, 4, 6, generator=generator), -1).expand(rows, -1, -1)
    target = torch.softmax(torch.randn(1, 5, 6, generator=generator), -1).expand(rows, -1, -1)
    uniform = torch.rand(rows, 9, generator=generator, dtype=torch.float64)
    tokens = sample(draft, uniform[:, :4])
    kept = {
        name: rule(tokens, draft, target, None, uniform[:, 4:8], uniform[:, 8]).accepted.float()
        for name, rule in VERIFICATION_RULES.items()
    }
    gain = kept["block"] - kept["token"]
    assert gain.mean() > 5 * gain.std() / rows**0.5
