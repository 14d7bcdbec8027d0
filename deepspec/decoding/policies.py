"""Policies: how many drafted tokens of each row to verify this round (DSpark section 4).

fixed         always the same number: the block by default, 1 is the shape of multi-token prediction, 0 plain decoding
threshold     up to the first token whose confidence is below a threshold
prefix        the hardware-aware prefix scheduler, algorithm 1 with its early stop
asynchronous  the scheduler without waiting: confidences two rounds old say how many tokens to verify, the current ones
              say which

All leave the output distribution as it is; `deepspec.decoding.scheduling` says why. Rows that get 0 places still emit
the one token that the pass of the target gives them.

The paper's schedulers draft in every round. Where the SPS table says what drafting takes, `Pausing` also leaves out
drafts that would not pay, so that speculation never falls far behind plain decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deepspec.config import ConfigError, near_match
from deepspec.decoding.scheduling import Ranking, RoundCost, best_places, places_until_first_drop, survivals
from deepspec.decoding.sps import SpsTable


class Policy(Protocol):
    """Decides verification lengths, round after round; one object per engine."""

    maximum: int  # the most drafted tokens of a row that it ever verifies: more need not be drafted
    needs_confidences: bool = True
    rows: int | None = None  # the most that it can decide about; None = any number

    def reset(self) -> None:
        """Forget earlier rounds."""
        return None

    def enter(self, new: int, rows: int) -> None:
        """Take note that `new` of the `rows` of the next round are new requests."""
        return None

    def to_draft(self, rows: int) -> int:
        """How many tokens of each row to draft in the next round; to be called once a round, before all else.

        Without any, the round is plain and `lengths` is not called.
        """
        return self.maximum

    def known_total(self, rows: int) -> int | None:
        """What the next round's lengths add up to, where the host knows it before the draft; else None."""
        return None

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        """Decide one round; to be called once a round, in order.

        Args:
            confidences: [rows, slots], c_k = P(token k kept given that those before it were); None only if they are
                not needed.

        Returns:
            long [rows], each 0..slots, on the device of the policy.
        """


class FixedLength(Policy):
    """Always the same number of tokens."""

    needs_confidences = False

    def __init__(self, length: int, device: torch.device | str = "cpu"):
        self.maximum = length
        self._device = device

    def known_total(self, rows: int) -> int | None:
        return rows * self.maximum

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        return torch.full((rows,), self.maximum, device=self._device)


class ConfidenceThreshold(Policy):
    """Up to the first token whose confidence is below the threshold."""

    def __init__(self, threshold: float, block_size: int):
        self.threshold = threshold
        self.maximum = block_size

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        assert confidences is not None
        return (confidences >= self.threshold).long().cumprod(1).sum(1)


class PrefixScheduler(Policy):
    """Algorithm 1: admit tokens by survival while tau * SPS(B) rises, stop at the first that does not raise it."""

    def __init__(self, cost: RoundCost, block_size: int):
        self.maximum, self.rows = block_size, cost.rows
        self._cost = cost.for_blocks_of(block_size)

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        assert confidences is not None
        ranking = Ranking.of(confidences)
        throughput = ranking.throughput(self._cost.seconds(rows, confidences.shape[1]))
        return ranking.lengths(places_until_first_drop(throughput))


class AsynchronousScheduler(Policy):
    """The number of places is the best one for the confidences of two rounds ago; the current ones are then ranked.

    So the host knows the size of the pass before the draft has run. The first two rounds after `reset` have no such
    confidences and verify whole blocks. If there are fewer rows than then, all of their tokens is the most they get.
    """

    DELAY = 2  # rounds

    def __init__(self, cost: RoundCost, block_size: int):
        self.maximum, self.rows = block_size, cost.rows
        self._cost = cost.for_blocks_of(block_size)
        self._places: deque[_OnItsWay] = deque()

    def reset(self) -> None:
        self._places.clear()

    def known_total(self, rows: int) -> int | None:
        return self._total(rows)

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        assert confidences is not None
        ranking = Ranking.of(confidences)
        lengths = ranking.lengths(self._total(rows))
        if len(self._places) == self.DELAY:
            self._places.popleft()
        throughput = ranking.throughput(self._cost.seconds(rows, confidences.shape[1]))
        self._places.append(_OnItsWay(best_places(throughput)))
        return lengths

    def _total(self, rows: int) -> int:
        everything = rows * self.maximum
        return everything if len(self._places) < self.DELAY else min(self._places[0].read(), everything)


class Pausing(Policy):
    """A scheduler that decodes plainly for a while when its drafts have not paid lately.

    A drafting round is worth (expected tokens per second) / (those of a plain round). When the running mean of that
    is not above 1, rounds are plain: 1, then 2, 4, 8, 16, and after each pause a drafting round starts a new mean. What
    a round does depends on earlier rounds alone, so the output distribution is that of the scheduler.
    """

    LONGEST = 16  # rounds without a draft
    MEMORY = 0.75  # of the running mean, a round

    def __init__(self, policy: Policy, cost: RoundCost):
        self.policy, self.maximum, self.rows = policy, policy.maximum, policy.rows
        self._cost = cost
        self._forget()

    def _forget(self) -> None:
        self._worth: Tensor | None = None  # running mean since the last pause
        self._news: _OnItsWay | None = None  # whether it is above 1, of the last round if that drafted
        self._pause = self._left = 0  # rounds

    def reset(self) -> None:
        self._forget()
        self.policy.reset()

    def enter(self, new: int, rows: int) -> None:
        """A pause is shortened by the share of the rows that have not earned it."""
        if new == rows:
            self._forget()
        kept = 1 - new / rows
        self._pause, self._left = round(self._pause * kept), round(self._left * kept)
        self.policy.enter(new, rows)

    def to_draft(self, rows: int) -> int:
        if self._news is not None:
            pays, self._news = self._news.read(), None
            if not pays:
                self._worth = None
            self._pause = self._left = 0 if pays else min(max(1, 2 * self._pause), self.LONGEST)
        self._left -= 1
        return self.policy.to_draft(rows) if self._left < 0 else 0

    def known_total(self, rows: int) -> int | None:
        return self.policy.known_total(rows)

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        assert confidences is not None
        lengths = self.policy.lengths(confidences, rows)
        slots = confidences.shape[1]
        verified = torch.arange(slots, device=lengths.device) < lengths[:, None]
        expected = rows + (survivals(confidences) * verified).sum()
        seconds = self._cost.seconds(rows, slots).take(lengths.sum())
        worth = expected / seconds / (rows / self._cost.plain_seconds(rows))
        self._worth = worth if self._worth is None else self.MEMORY * self._worth + (1 - self.MEMORY) * worth
        self._news = _OnItsWay(self._worth > 1)
        return lengths


class _OnItsWay:
    """A number that the device is computing, copied to the host without waiting for it."""

    def __init__(self, value: Tensor):
        self._copy = value.to("cpu", non_blocking=True)
        self._copied = None
        if value.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._copy)


class Calibrated(Policy):
    """A policy that is shown calibrated confidences."""

    def __init__(self, policy: Policy, temperatures: Tensor):
        """Args: temperatures [slots]."""
        self.policy, self.temperatures = policy, temperatures
        self.maximum, self.rows = policy.maximum, policy.rows

    def reset(self) -> None:
        self.policy.reset()

    def enter(self, new: int, rows: int) -> None:
        self.policy.enter(new, rows)

    def to_draft(self, rows: int) -> int:
        return self.policy.to_draft(rows)

    def known_total(self, rows: int) -> int | None:
        return self.policy.known_total(rows)

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        assert confidences is not None
        return self.policy.lengths(calibrated(confidences, self.temperatures), rows)


def calibrated(confidences: Tensor, temperatures: Tensor) -> Tensor:
    """sigmoid(logit(c_k) / T_k): confidences [..., slots], T > 0 [slots] -> [..., slots]."""
    return torch.sigmoid(torch.logit(confidences) / temperatures)


@dataclass(frozen=True)
class PolicySetup:
    """What a policy may be built from; the names in messages are those of the `decode` configuration."""

    block_size: int  # of the draft; 0 = there is none
    rows: int  # the most that are decoded together
    has_confidences: bool
    device: torch.device | str = "cpu"
    draft_tokens: int | None = None  # fixed: how many; None = the block
    confidence_threshold: float = 0.0  # threshold
    sps: SpsTable | None = None  # prefix, asynchronous
    temperatures: Sequence[float] | None = None  # T_k of the calibration, one per slot; None = confidences as they are

    def scheduler(self, name: str, make: Callable[[RoundCost, int], Policy]) -> Policy:
        """Pausing where it is known what drafting takes."""
        if self.sps is None:
            raise ConfigError(
                f"decode.policy={name}: needs an SPS table; measure one with python -m deepspec.decoding.profile and "
                "name it with decode.sps"
            )
        cost = RoundCost(self.sps, self.rows, self.block_size, self.device)
        policy = make(cost, self.block_size)
        return Pausing(policy, cost) if self.sps.draft_seconds else policy


def _fixed(setup: PolicySetup) -> Policy:
    length = setup.block_size if setup.draft_tokens is None else setup.draft_tokens
    if not 0 <= length <= setup.block_size:
        drafts = f"this draft proposes {setup.block_size}" if setup.block_size else "there is no draft"
        raise ConfigError(f"decode.draft_tokens={length}: must be from 0 to {setup.block_size}; {drafts}")
    return FixedLength(length, setup.device)


def _threshold(setup: PolicySetup) -> Policy:
    return ConfidenceThreshold(setup.confidence_threshold, setup.block_size)


def _prefix(setup: PolicySetup) -> Policy:
    return setup.scheduler("prefix", PrefixScheduler)


def _asynchronous(setup: PolicySetup) -> Policy:
    return setup.scheduler("asynchronous", AsynchronousScheduler)


SCHEDULERS = ("prefix", "asynchronous")  # the policies that read an SPS table
POLICIES: dict[str, Callable[[PolicySetup], Policy]] = {
    "fixed": _fixed,
    "threshold": _threshold,
    "prefix": _prefix,
    "asynchronous": _asynchronous,
}


def build_policy(name: str, setup: PolicySetup) -> Policy:
    """The policy of this name, calibrated where the setup has temperatures.

    Raises:
        ConfigError: no such policy, a setting that it does not know or cannot work with, or a draft without the
            confidences or an engine without the SPS table that it needs.
    """
    if name not in POLICIES:
        raise ConfigError(f"decode.policy={name}: must be one of {', '.join(POLICIES)}.{near_match(name, POLICIES)}")
    if setup.draft_tokens is not None and name != "fixed":
        raise ConfigError(f"decode.draft_tokens={setup.draft_tokens}: only decode.policy=fixed has a set number")
    if setup.confidence_threshold and name != "threshold":
        raise ConfigError(
            f"decode.confidence_threshold={setup.confidence_threshold}: only decode.policy=threshold has one"
        )
    policy = POLICIES[name](setup)
    if not policy.needs_confidences:
        return policy
    if not setup.has_confidences:
        raise ConfigError(
            f"decode.policy={name}: this draft has no confidence head; train one with draft.confidence_head=true, or "
            "set decode.policy=fixed"
        )
    if setup.temperatures is None:
        return policy
    if len(setup.temperatures) != setup.block_size:
        raise ConfigError(
            f"{len(setup.temperatures)} calibration temperatures for a block of {setup.block_size}: calibrate this "
            "draft with python -m deepspec.decoding.calibrate"
        )
    return Calibrated(policy, torch.tensor(setup.temperatures, dtype=torch.float32, device=setup.device))
