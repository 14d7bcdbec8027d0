"""The regeneration benchmark: every way makes the tokens that are asked for, and ratios are taken within a repeat."""

from __future__ import annotations

from decoding_world import random_target

from benchmarks.regeneration import OURS, RegenerationOptions, measure, result_of, with_the_engine


def test_the_engine_beside_another_way():
    decode = with_the_engine(RegenerationOptions(), random_target(vocab_size=40))
    asked = []

    def other(prompts, new_tokens):
        asked.append((len(prompts), new_tokens))
        return 2.0

    speeds = measure({OURS: decode, "other": other}, [[1, 2], [3]], 6, repeats=2)
    assert asked == [(2, 4), (2, 6), (2, 6)]
    assert speeds["other"] == [6.0, 6.0]
    result = result_of({OURS: [3.0, 9.0], "other": [6.0, 6.0]})
    assert result[OURS]["ratios"]["other"] == {"median": 1.0, "min": 0.5, "max": 1.5}
