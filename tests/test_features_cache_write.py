"""Writing a feature cache: what is in it, and that neither death nor company changes a byte of it."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch
from cache_world import as_cache_run, cached_run, contents, write_cache, write_in_child
from safetensors.torch import load_file
from training_world import changed, write_rows

import deepspec.features.cache_plan as cache_plan
from data_prep.cache import write
from data_prep.estimate import contents_of
from deepspec.data.jsonl import read_jsonl
from deepspec.data.packing import anchor_candidates, lay_out
from deepspec.features.cache_format import MANIFEST, SETTINGS, CacheError, read_manifest, shard_file
from deepspec.features.cache_plan import shard_bounds
from deepspec.features.cache_storage import STORAGES
from deepspec.targets import Target, TargetFeatures, load_target

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture(scope="module")
def whole(training_world, in_temporary_folder, tmp_path_factory):
    """A cache written in one go."""
    return write_cache(cached_run(training_world, tmp_path_factory.mktemp("whole") / "cache"))


def start(processes, run, folder, **options):
    process = processes.Process(target=write_in_child, args=(run, str(folder)), kwargs=options)
    process.start()
    return process


def finish(process) -> int:
    process.join(120)
    return process.exitcode


def test_holds_what_the_target_computes_and_no_more(training_world, whole):
    """Every document of both data sets, its tokens, its context up to the last anchor, its states that carry loss."""
    run = cached_run(training_world, whole)
    survey = contents_of(run).survey
    target = load_target(run.target.path)
    manifest = read_manifest(whole)
    assert len(manifest.shards) > 3
    assert [shard.first for shard in manifest.shards[1:]] == [shard.end for shard in manifest.shards[:-1]]
    assert manifest.shards[-1].end == len(survey) == survey.samples == 18
    assert sum(shard.tokens for shard in manifest.shards) == survey.tokens.sum() == manifest.settings.tokens
    for number, shard in enumerate(manifest.shards):
        tensors = load_file(shard_file(whole, number))
        assert len(tensors["keys"]) == shard.end - shard.first
        for place, document in enumerate(range(shard.first, shard.end)):
            sample = survey.sample(document)
            batch = lay_out([[sample]], 0)
            features = target.features(batch, [0, 1])
            candidates = anchor_candidates(batch.loss_mask, batch.position_ids)[0]
            last = int(candidates.nonzero().max())

            def rows(name, kind, place=place, tensors=tensors):
                begin, end = tensors[f"{kind}_offsets"][place : place + 2].tolist()
                return tensors[name][begin:end]

            assert bytes(tensors["keys"][place].numpy()) == survey.keys[document].tobytes()
            assert rows("token_ids", "token").tolist() == sample.input_ids
            assert rows("loss_mask", "token").tolist() == sample.loss_mask
            torch.testing.assert_close(rows("context", "context"), features.context[0, :last], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(rows("final", "final"), features.final[0, candidates], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", STORAGES)
def test_estimate_is_the_size_on_disk(training_world, tmp_path, dtype):
    run = changed(cached_run(training_world, tmp_path), features={"cache_dtype": dtype, "cache_shard_mib": 512.0})
    estimate = contents_of(run).total_bytes(dtype)
    write_cache(run)
    header = 1200
    assert estimate < shard_file(tmp_path, 0).stat().st_size < estimate + header


def test_equal_documents_are_stored_once(training_world, tmp_path):
    rows = [row for _, row in read_jsonl(training_world / "train.jsonl")]
    rows = [row for row in rows if "So it is. So it is." in row["messages"][1]["content"]][:6]
    again = [row | {"id": f"again {row['id']}"} for row in rows[:4]]
    file = write_rows(tmp_path / "twice.jsonl", rows + again)
    run = changed(cached_run(training_world, tmp_path / "cache"), data={"train_files": [file], "eval_files": [file]})
    settings = read_manifest(write_cache(run)).settings
    assert (settings.samples, settings.documents) == (20, 6)


def test_shards_are_cut_by_size_alone():
    sizes = np.array([3, 3, 3, 3, 25, 3, 3])
    assert shard_bounds(sizes, 10).tolist() == [0, 4, 5, 6, 7]
    assert shard_bounds(sizes, 1000).tolist() == [0, 7]
    assert shard_bounds(sizes, 1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "death",
    [
        ("fsync", 1),  # settings.json
        ("fsync", 2),  # documents.safetensors
        ("replace", 3),  # the first shard is on disk, not yet in place
        ("replace", 4),  # in place, its record not yet written
        ("fsync", 9),  # in a later shard
        ("replace", 8),
    ],
)
def test_killed_writer_leaves_nothing_that_matters(training_world, whole, processes, tmp_path, death):
    """Killed, then finished by two ranks: the same bytes as in one go, and no large leftovers."""
    cache = tmp_path / "cache"
    run = cached_run(training_world, cache)
    assert finish(start(processes, run, tmp_path, die_at=death)) == -signal.SIGKILL
    assert not (cache / MANIFEST).exists()
    ranks = [start(processes, run, tmp_path, rank=rank, ranks=2) for rank in (0, 1)]
    assert [finish(rank) for rank in ranks] == [0, 0]
    written = contents(cache)
    leftovers = {name for name in written if name.endswith(".tmp")}
    assert not [name for name in leftovers if name.startswith("shards")]
    assert {name: data for name, data in written.items() if name not in leftovers} == contents(whole)


def test_killed_again_and_again(training_world, whole, processes, tmp_path):
    """Each attempt completes one shard before it dies."""
    run = cached_run(training_world, tmp_path / "cache")
    deaths = 0
    while finish(start(processes, run, tmp_path, die_at=("replace", 4 if deaths == 0 else 3))) != 0:
        deaths += 1
        assert deaths < 20
    assert deaths >= 3
    written = {name: data for name, data in contents(tmp_path / "cache").items() if not name.endswith(".tmp")}
    assert written == contents(whole)


def test_finished_shards_are_not_computed_again(training_world, whole, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    shard_file(cache, 2).unlink()
    (cache / MANIFEST).unlink()
    computed = []
    original = Target.features
    monkeypatch.setattr(
        Target, "features", lambda self, batch, ids: (computed.extend(batch.documents), original(self, batch, ids))[1]
    )
    run = cached_run(training_world, cache)
    write_cache(run)
    shard = read_manifest(whole).shards[2]
    assert len(computed) == shard.end - shard.first
    assert contents(cache) == contents(whole)
    monkeypatch.setattr("data_prep.cache.load_target", lambda *a, **k: pytest.fail("nothing was left to compute"))
    write_cache(run)
    assert contents(cache) == contents(whole)


def test_two_ranks_from_nothing(training_world, whole, processes, tmp_path):
    """Also the tokenized data do not exist yet, and both ranks want them."""
    run = cached_run(training_world, tmp_path / "cache")
    ranks = [start(processes, run, tmp_path, rank=rank, ranks=2) for rank in (0, 1)]
    assert [finish(rank) for rank in ranks] == [0, 0]
    assert contents(tmp_path / "cache") == contents(whole)


def test_one_rank_of_two_leaves_the_rest(training_world, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = cached_run(training_world, tmp_path)
    write_cache(run)
    assert "shards are left to ranks that are still writing" in capsys.readouterr().out
    assert not (tmp_path / MANIFEST).exists()
    monkeypatch.setenv("RANK", "1")
    write_cache(run)
    assert contents(tmp_path) == contents(whole)


def test_disk_too_small(training_world, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 9 * 10**5, 10**5)
    monkeypatch.setattr(cache_plan.shutil, "disk_usage", lambda folder: usage)
    run = cached_run(training_world, tmp_path / "cache")
    with pytest.raises(CacheError) as error:
        write_cache(run)
    message = str(error.value)
    assert "are needed for" in message
    assert "but 100 kB are free" in message
    assert "int8 " in message
    assert "force=true" in message
    assert not (tmp_path / "cache").exists()
    write(as_cache_run(run, force=True))
    assert (tmp_path / "cache" / MANIFEST).exists()


def test_disk_that_fills_while_writing(training_world, whole, tmp_path):
    """A real write error: this process may write no file above 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = cached_run(training_world, tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CacheError, match=r"could not write .*000000.safetensors: .*Complete shards are kept"):
            write_cache(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not [name for name in contents(tmp_path) if name.startswith("shards")]
    write_cache(run)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"max_length": 60}}, "data.max_length=60, but the cache was written with 64"),
        ({"draft": {"target_layer_ids": [0, 2]}}, r"layer_ids is \[0, 2\], but was \[0, 1\]"),
        ({"features": {"cache_dtype": "int8"}}, "dtype is int8, but was float32"),
        ({"features": {"cache_shard_mib": 1.0}}, "shards is 1, but was "),
        ({"data": {"eval_files": []}}, "documents is 15, but was 18"),
    ],
)
def test_folder_of_another_cache_is_left_alone(training_world, whole, changes, expected):
    before = contents(whole)
    run = changed(cached_run(training_world, whole), **changes)
    with pytest.raises(CacheError, match=expected) as error:
        write_cache(run)
    assert f"features.cache_dir={whole} holds another cache" in str(error.value)
    assert contents(whole) == before


def test_records_of_another_cache_do_not_count(training_world, whole, tmp_path):
    """settings.json is gone and other settings are written: no old shard is taken over."""
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    (cache / SETTINGS).unlink()
    write_cache(changed(cached_run(training_world, cache), draft={"target_layer_ids": [0, 2]}))
    assert json.loads((cache / SETTINGS).read_text())["layer_ids"] == [0, 2]
    old, new = (load_file(shard_file(folder, 0)) for folder in (whole, cache))
    assert torch.equal(old["token_ids"], new["token_ids"])
    assert not torch.equal(old["context"], new["context"])


def test_features_that_are_not_finite(training_world, tmp_path, monkeypatch):
    original = Target.features

    def overflowing(self, batch, layer_ids):
        features = original(self, batch, layer_ids)
        candidate = anchor_candidates(batch.loss_mask, batch.position_ids)[0].nonzero()[-1]
        features.final[0, candidate] = float("inf")
        return TargetFeatures(features.context, features.final)

    monkeypatch.setattr(Target, "features", overflowing)
    with pytest.raises(CacheError, match=r"samples row\d+.* are not all finite.*target.dtype than torch.float32"):
        write_cache(cached_run(training_world, tmp_path))
