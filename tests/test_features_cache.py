"""Features from a cache on disk: the same training as online, whole after any death, refused when it does not fit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal

import pytest
from cache_world import as_cache_run, cached_run, contents, write_cache, write_in_child
from training_world import changed, draft_weights, tiny_run

from data_prep.cache import repair, verify
from deepspec.features.cache_format import CacheError, shard_file
from deepspec.files import unfinished_name
from deepspec.targets import target as target_module
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
    monkeypatch.setattr(target_module.AutoModelForCausalLM, "from_pretrained", None)
    result = train(cached_run(training_world, cache, tmp_path / "run", **split))
    assert result.metrics["loss"] == pytest.approx(online.metrics["loss"], rel=1e-5)
    assert result.metrics["eval/loss"] == pytest.approx(online.metrics["eval/loss"], rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float8", 5e-2), ("int8", 2e-2)])
def test_smaller_dtypes_stay_close(training_world, online, tmp_path, dtype, tolerance):
    run = cached_run(training_world, tmp_path / "features", tmp_path / "run")
    run = changed(run, features={"cache_dtype": dtype})
    write_cache(run)
    assert train(run).metrics["loss"] == pytest.approx(online.metrics["loss"], rel=tolerance)


def test_killed_while_writing_goes_on_and_ends_with_the_same_bytes(training_world, cache, tmp_path):
    run = cached_run(training_world, tmp_path / "features")
    context = multiprocessing.get_context("spawn")
    for death in (("fsync", 3), ("replace", 2)):
        process = context.Process(target=write_in_child, args=(run, str(tmp_path)), kwargs={"die_at": death})
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, death
    write_cache(run)
    assert contents(tmp_path / "features") == contents(cache)


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


def test_missing_shard_and_missing_cache(training_world, cache, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(cache, folder)
    shard = shard_file(folder, 0)
    shard.unlink()
    with pytest.raises(CacheError, match=shard.name):
        train(cached_run(training_world, folder, tmp_path / "run"))
    with pytest.raises(CacheError, match=r"data_prep\.cache"):
        train(cached_run(training_world, tmp_path / "nothing", tmp_path / "run"))


def test_wrong_layers_are_refused(training_world, cache, tmp_path):
    with pytest.raises(CacheError, match="layer"):
        train(cached_run(training_world, cache, tmp_path, draft={"target_layer_ids": [0, 2]}))


def test_resume_is_exact(training_world, cache, tmp_path):
    whole = train(cached_run(training_world, cache, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    again = train(cached_run(training_world, cache, tmp_path / "again"))
    assert draft_weights(again.checkpoint) == draft_weights(whole.checkpoint)
