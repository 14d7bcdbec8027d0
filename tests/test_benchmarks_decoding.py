"""The decoding benchmark: all ways decode the same text, and are compared with what they should be."""

from __future__ import annotations

import pytest
from decoding_world import random_draft, random_target

from benchmarks.decoding import BenchmarkOptions, measure, result_of, ways_to_decode
from benchmarks.head_cost import head_share
from deepspec.decoding import Request

SEEDS = {"math": (1, 2), "chat": (4, 6, 8)}  # of each set, the first token of its prompts


@pytest.fixture(scope="module")
def pair():
    target = random_target(vocab_size=40)
    return target, random_draft(target, num_layers=1, block_size=3, target_layer_ids=(0,), mask_token_id=0)


def test_every_way_decodes_the_same_text(pair):
    options = BenchmarkOptions(batches="1,2", temperature=0.0, max_new_tokens=9)
    sets = {name: [Request([seed, 3, 5, 3], 9, stop_token_ids=(7,)) for seed in seeds] for name, seeds in SEEDS.items()}
    ways = ways_to_decode(options, *pair, sets)
    runs = measure(ways, repeats=2)
    of_set = {name: runs[f"plain, batch 1, {name}"][0].tokens for name in sets}
    for name, of_way in runs.items():
        expected = next((tokens for key, tokens in of_set.items() if name.endswith(key)), sum(of_set.values()))
        assert [run.tokens for run in of_way] == [expected] * 2, name
    name = "speculative, batch 2"
    result = result_of(runs[name], {other: runs[other] for other in ways[name].against})
    assert list(result["ratios"]) == ["plain, batch 2", "transformers generate", "one prompt, growing cache"]
    assert result["tau"] == sum(run.emitted for run in runs[name]) / sum(run.rounds for run in runs[name]) >= 1


def test_the_heads_share_is_of_rounds_that_stay_full(pair):
    share = head_share(*pair, [Request([1, 2], 1, stop_token_ids=tuple(range(40)))], batch=3, repeats=2, rounds=2)
    assert -1 < share["min"] <= share["median"] <= share["max"]
