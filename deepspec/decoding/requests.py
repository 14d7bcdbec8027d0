"""What goes into the engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One prompt with its own settings and its own random stream."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    repetition_penalty: float = 1.0  # 1 = off
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()  # needs an engine that can decode

    def __post_init__(self) -> None:
        for name, value, fits, allowed in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or above"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0.01 <= self.repetition_penalty <= 100,
                "0.01 to 100 (1 = off)",
            ),
            (
                "stop_strings",
                self.stop_strings,
                not isinstance(self.stop_strings, str) and all(self.stop_strings),
                "a tuple of strings that are not empty",
            ),
        ):
            if not fits:
                raise ValueError(f"{name}={value!r}: must be {allowed}")


@dataclass(frozen=True)
class Round:
    """One verification round, counted as the paper counts (DSpark section 5).

    When an accepted token is a stop or completes a stop string, the proposal counts up to it and there is no bonus
    token. `accepted` may go beyond `max_new_tokens` in the last round; `emitted` never does.
    """

    proposed: int  # drafted tokens that were verified
    accepted: int  # of them kept
    emitted: int  # tokens that became output: accepted ones and the bonus or corrected one
    confidences: list[float] | None  # of the proposed tokens, if the draft has a confidence head


@dataclass
class Completion:
    """The output of one request. The first token comes from the prefill pass and belongs to no round."""

    output_ids: list[int] = field(default_factory=list)  # with the stop token or the whole stop string, if any
    rounds: list[Round] = field(default_factory=list)
    finish_reason: str = ""  # stop, length, or error: the logits of this request were not finite


@dataclass
class Timing:
    """Wall seconds spent in each part of a `generate` call."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    rounds: int = 0  # of the batch: passes of the target after prefill
