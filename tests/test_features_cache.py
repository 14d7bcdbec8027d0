"""Training from a feature cache: as online, and exact after a resume; finding and repairing damage."""

from __future__ import annotations

import os
import shutil

import pytest
from cache_world import as_cache_run, cached_run, contents, write_cache
from training_world import draft_weights, tiny_run
from transformers import AutoModelForCausalLM

from data_prep.cache import repair, verify
from deepspec.features.cache_format import CacheError, shard_file
from deepspec.files import unfinished_name
from deepspec.training import train

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture(scope="module")
def online(training_world, in_temporary_folder, tmp_path_factory):
    return train(tiny_run(training_world, tmp_path_factory.mktemp("online")))


@pytest.fixture(scope="module")
def cache(training_world, in_temporary_folder, tmp_path_factory):
    """In float32, six shards or so."""
    return write_cache(cached_run(training_world, tmp_path_factory.mktemp("cache") / "features"))


@pytest.mark.parametrize("split", [{}, {"tokens_per_batch": 128}], ids=["padded", "packed"])
def test_float32_trains_like_online_and_loads_no_target(training_world, cache, online, tmp_path, monkeypatch, split):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    result = train(cached_run(training_world, cache, tmp_path / "run", **split))
    assert result.metrics["loss"] == pytest.approx(online.metrics["loss"], rel=1e-5)
    assert result.metrics["eval/loss"] == pytest.approx(online.metrics["eval/loss"], rel=1e-5)


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(training_world, cache, tmp_path):
    """A whole day tells them apart where every rank writes the same file."""
    folder = tmp_path / "features"
    shutil.copytree(cache, folder)
    old, new = (unfinished_name(folder / "manifest.json") for _ in range(2))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (0, 0))
    write_cache(cached_run(training_world, folder))
    assert not old.exists()
    assert contents(folder) == contents(cache) | {new.name: b"{"}


def test_a_flipped_byte_is_found_named_and_repaired(training_world, cache, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(cache, folder)
    run = as_cache_run(cached_run(training_world, folder))
    verify(run)
    shard = shard_file(folder, 1)
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(CacheError, match=shard.name):
        verify(run)
    repair(run)
    assert contents(folder) == contents(cache)


def test_resume_is_exact(training_world, cache, tmp_path):
    whole = train(cached_run(training_world, cache, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    again = train(cached_run(training_world, cache, tmp_path / "again"))
    assert draft_weights(again.checkpoint) == draft_weights(whole.checkpoint)
