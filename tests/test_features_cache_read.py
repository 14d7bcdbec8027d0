"""Reading a feature cache: the loss of online features in any batch, and every reason to refuse a cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from cache_world import cached_run, write_cache
from training_world import changed, tiny_run, write_rows
from transformers import Qwen3ForCausalLM

import deepspec.targets.head as head_module
import deepspec.training.setup as training_setup
from deepspec.data.jsonl import read_jsonl
from deepspec.data.sampler import StepSampler
from deepspec.features import CachedFeatures, FeatureQueue
from deepspec.features.cache_format import (
    DOCUMENTS,
    MANIFEST,
    CacheError,
    read_manifest,
    record_file,
    shard_file,
    stored_positions,
)
from deepspec.training.batches import MicroBatchMaker, batch_split, training_steps
from deepspec.training.objective import DraftTrainingModule
from deepspec.training.setup import prepare_materials

pytestmark = pytest.mark.usefixtures("in_temporary_folder")
SPLITS = {
    "one by one": {"micro_batch_size": 1},
    "padded": {"micro_batch_size": 4},
    "packed": {"tokens_per_batch": 128},
}


@pytest.fixture(scope="module")
def cache(training_world, in_temporary_folder, tmp_path_factory):
    """In float32, each document computed alone."""
    run = cached_run(training_world, tmp_path_factory.mktemp("cache") / "features")
    return write_cache(changed(run, features={"cache_batch_tokens": 1}))


@pytest.fixture(scope="module")
def packed_cache(training_world, in_temporary_folder, tmp_path_factory):
    """In float32, many documents in one pass."""
    return write_cache(cached_run(training_world, tmp_path_factory.mktemp("cache") / "features"))


def materials_of(run):
    return prepare_materials(run, Accelerator(cpu=True), None)


def steps_of(run, materials, steps: int = 4, num_workers: int = 0):
    """Micro-batches in the order of training."""
    split = batch_split(run.train, 1, materials.train_set.lengths())
    sampler = StepSampler(split, len(materials.train_set), rank=0, seed=run.seed, start_step=0, steps=steps)
    make = MicroBatchMaker(
        pad_id=materials.pad_id,
        packed=run.train.tokens_per_batch is not None,
        num_anchors=run.train.num_anchors,
        draft_length=run.draft.block_size,
        decay=run.train.loss.decay,
        seed=run.seed,
    )
    for batches in training_steps(materials.train_set, sampler, make, num_workers):
        yield from batches


def losses(run, num_workers: int = 0) -> list[float]:
    """Of the fresh draft, for four steps of micro-batches."""
    materials = materials_of(run)
    module = DraftTrainingModule(materials.draft, run.train.loss)
    found = []
    with torch.no_grad():
        for batch in steps_of(run, materials, num_workers=num_workers):
            features = materials.features.batch_features(batch.tokens)
            inputs = batch.to(torch.device("cpu"))
            sums = module(**inputs, context_features=features.context, final_features=features.final)
            found.append(float(sums["loss"]))
    return found


@pytest.mark.parametrize("name", SPLITS)
def test_float32_gives_the_loss_of_online_features(training_world, cache, packed_cache, name):
    """Exactly where both compute a document alone; elsewhere matrix products round by the shape of the batch."""
    online = losses(tiny_run(training_world, "unused", **SPLITS[name]))
    assert len(online) >= 4
    alone = losses(cached_run(training_world, cache, **SPLITS[name]))
    assert alone == (online if name == "one by one" else pytest.approx(online, rel=1e-6))
    assert losses(cached_run(training_world, packed_cache, **SPLITS[name])) == pytest.approx(online, rel=1e-6)


@pytest.mark.parametrize("name", ["padded", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float8", 5e-2), ("int8", 2e-2)])
def test_smaller_numbers_give_nearly_the_loss(training_world, tmp_path, name, dtype, tolerance):
    run = changed(cached_run(training_world, tmp_path, **SPLITS[name]), features={"cache_dtype": dtype})
    write_cache(run)
    online = losses(tiny_run(training_world, "unused", **SPLITS[name]))
    stored = losses(run)
    assert stored == pytest.approx(online, rel=tolerance)
    assert stored != pytest.approx(online, rel=1e-6)


def test_features_where_they_are_stored_and_zero_elsewhere(training_world, packed_cache):
    run = cached_run(training_world, packed_cache, **SPLITS["packed"])
    online = materials_of(changed(run, features={"source": "online"}))
    stored = materials_of(run)
    for batch in steps_of(run, stored, steps=2):
        theirs, ours = (materials.features.batch_features(batch.tokens) for materials in (online, stored))
        context, final = torch.zeros_like(ours.context), torch.zeros_like(ours.final)
        for document in batch.tokens.documents:
            length, positions = stored_positions(batch.tokens.loss_mask[document.row, document.columns].numpy())
            seen = slice(document.start, document.start + length)
            context[document.row, seen] = theirs.context[document.row, seen]
            final[document.row, document.start + positions] = theirs.final[document.row, document.start + positions]
        torch.testing.assert_close(ours.context, context, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.final, final, rtol=1e-5, atol=1e-5)


def test_order_of_loader_processes_and_of_a_queue(training_world, packed_cache):
    run = cached_run(training_world, packed_cache, **SPLITS["padded"])
    assert losses(run, num_workers=2) == losses(run)
    materials = materials_of(run)
    batches = [batch.tokens for batch in steps_of(run, materials)]
    expected = [materials.features.batch_features(batch) for batch in batches]
    queue = FeatureQueue(materials.features, 3, torch.device("cpu"))
    queue.announce(batches)
    for features in expected:
        assert torch.equal(queue.next().context, features.context)
    queue.close()


def test_document_without_a_place_for_a_block(training_world, tmp_path):
    empty = {"id": "one", "messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": ""}]}
    rows = [row for _, row in read_jsonl(training_world / "train.jsonl")]
    file = write_rows(tmp_path / "mixed.jsonl", [empty, *rows[:7]])
    data = {"train_files": [file], "min_supervised_tokens": 0}
    run = changed(cached_run(training_world, tmp_path / "features", **SPLITS["padded"]), data=data)
    write_cache(run)
    assert losses(run) == pytest.approx(losses(changed(run, features={"source": "online"})), rel=1e-6)


@pytest.mark.parametrize("start_from_target", [False, True])
def test_target_is_loaded_only_to_start_from_it(training_world, packed_cache, monkeypatch, start_from_target):
    loaded = []
    load_target = head_module.load_target
    monkeypatch.setattr(
        training_setup, "load_target", lambda *a, **k: pytest.fail("loaded although features are stored")
    )

    def counted(*arguments, **options):
        loaded.append(options)
        return load_target(*arguments, **options)

    monkeypatch.setattr(head_module, "load_target", counted)
    draft = {"start_from_target": start_from_target}
    materials = materials_of(cached_run(training_world, packed_cache, draft=draft))
    assert len(loaded) == start_from_target
    monkeypatch.undo()
    online = materials_of(tiny_run(training_world, "unused", draft=draft))
    for (name, ours), (_, theirs) in zip(
        materials.draft.named_parameters(), online.draft.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def refusal(run) -> str:
    with pytest.raises(CacheError) as error:
        losses(run)
    return str(error.value)


def copy_of(cache: Path, folder: Path) -> Path:
    return shutil.copytree(cache, folder / "features")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_no_cache_and_an_unfinished_one(training_world, cache, tmp_path):
    message = refusal(cached_run(training_world, tmp_path))
    assert (
        f"features.cache_dir={tmp_path}: there is no feature cache; write it with `python -m data_prep.cache`"
        in message
    )
    folder = copy_of(cache, tmp_path)
    (folder / MANIFEST).unlink()
    record_file(folder, 2).unlink()
    shards = len(read_manifest(cache).shards)
    message = refusal(cached_run(training_world, folder))
    assert f"not finished, {shards - 1} of {shards} shards are complete; run the same" in message


def test_another_target(training_world, cache, tmp_path):
    shutil.copytree(training_world / "target", tmp_path / "target")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "target")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "target")
    message = refusal(changed(cached_run(training_world, cache), target={"path": str(tmp_path / "target")}))
    fingerprint = read_manifest(cache).settings.target_fingerprint
    assert f"a cache of target {training_world / 'target'} with fingerprint {fingerprint[:12]}, but" in message
    assert "write a cache for this run in another folder: python -m data_prep.cache" in message


def test_another_dtype_of_the_target(training_world, cache):
    message = refusal(changed(cached_run(training_world, cache), target={"dtype": "bfloat16"}))
    assert "the target computed in float32, but this run says target.dtype=bfloat16" in message


def test_other_layers(training_world, cache):
    message = refusal(cached_run(training_world, cache, draft={"target_layer_ids": [0, 2]}))
    assert "a cache of the target layers [0, 1], but this draft reads [0, 2]; give that cache's" in message


def test_another_schema(training_world, cache, tmp_path):
    folder = copy_of(cache, tmp_path)
    edit(folder / MANIFEST, schema_version=7)
    message = refusal(cached_run(training_world, folder))
    assert f"{folder / MANIFEST}: a cache of schema version 7, but this DeepSpec reads 1; write it again" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "shard_files": [{}]}'])
def test_damaged_manifest(training_world, cache, tmp_path, text):
    folder = copy_of(cache, tmp_path)
    (folder / MANIFEST).write_text(text)
    message = refusal(cached_run(training_world, folder))
    assert f"{folder / MANIFEST}: damaged" in message
    assert f"python -m data_prep.cache repair features.cache_dir={folder}" in message


def test_missing_and_shortened_shards(training_world, cache, tmp_path):
    folder = copy_of(cache, tmp_path)
    shard_file(folder, 1).unlink()
    cut = shard_file(folder, 3)
    cut.write_bytes(cut.read_bytes()[:-1])
    message = refusal(cached_run(training_world, folder))
    assert f"{folder}: missing or cut short: shards/000001.safetensors, shards/000003.safetensors;" in message
    assert f"repair features.cache_dir={folder}" in message


def test_damaged_list_of_documents(training_world, cache, tmp_path):
    folder = copy_of(cache, tmp_path)
    flip(folder / DOCUMENTS, -1)
    message = refusal(cached_run(training_world, folder))
    assert f"{folder / DOCUMENTS}: missing, or its content differs from manifest.json; python -m" in message


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_flipped_bit_in_the_header_of_a_shard(training_world, cache, tmp_path):
    folder = copy_of(cache, tmp_path)
    flip(shard_file(folder, 2), 8)
    message = refusal(cached_run(training_world, folder, **SPLITS["padded"]))
    assert f"{shard_file(folder, 2)}: " in message
    assert f"repair features.cache_dir={folder}" in message


def test_flipped_bits_in_the_features_of_a_document(training_world, cache, tmp_path):
    """A bit of context, scales and final state of a document in turn."""
    folder = tmp_path / "features"
    run = changed(cached_run(training_world, folder), features={"cache_dtype": "int8"})
    write_cache(run)
    intact = shard_file(folder, 0).read_bytes()
    header_bytes = int.from_bytes(intact[:8], "little")
    header = json.loads(intact[8 : 8 + header_bytes])
    for name in ("context", "context_scales", "final"):
        shard_file(folder, 0).write_bytes(intact)
        flip(shard_file(folder, 0), 8 + header_bytes + header[name]["data_offsets"][0])
        assert "document 0 of the shard differs from what was written (CRC-32)" in refusal(run), name


def test_other_rendering_is_named(training_world, cache, tmp_path):
    base = cached_run(training_world, cache)
    template = tmp_path / "other.jinja"
    template.write_text((training_world / "target" / "chat_template.jinja").read_text().replace("user", "User") + " ")
    causes = {
        "data.max_length=48, but the cache was written with 64": {"max_length": 48},
        "the chat template is another one": {"chat_template": str(template)},
    }
    for cause, change in causes.items():
        message = refusal(changed(base, data=change))
        assert cause in message
        assert "is not in the cache" in message
        assert "write one for this run in another folder: python -m data_prep.cache" in message


def test_other_data_are_named(training_world, cache, tmp_path):
    rows = [row for _, row in read_jsonl(training_world / "train.jsonl")]
    rows[4]["messages"][1]["content"] = "Nobody knows what that is, so it is."
    file = write_rows(tmp_path / "other.jsonl", rows)
    message = refusal(changed(cached_run(training_world, cache), data={"train_files": [file]}))
    assert "is not in the cache: the rendering is the same, so the data files are others" in message
    assert str(training_world / "train.jsonl") in message


def test_options_and_vocabulary_in_the_explanation(training_world, cache):
    rendering = read_manifest(cache).settings.rendering
    other = dataclasses.replace(rendering, template_options={"enable_thinking": True}, tokenizer="0")
    found = " ".join(other.differences(rendering))
    assert "data.template_options={'enable_thinking': True}, but the cache was written with {}" in found
    assert "the tokenizer has another vocabulary" in found
    assert not rendering.differences(rendering)


def test_missing_document_is_found_before_the_first_step(training_world, cache):
    run = changed(cached_run(training_world, cache), data={"max_length": 48})
    with pytest.raises(CacheError, match=r"sample \d+ \(48 tokens\) is not in the cache"):
        materials_of(run)


def test_cache_in_bfloat16_of_a_target_in_bfloat16_is_exact(training_world, tmp_path):
    """What a bfloat16 target computes is stored without loss, its final states in every storage."""
    run = changed(cached_run(training_world, tmp_path / "a"), target={"dtype": "bfloat16"})
    features = {}
    for dtype in ("bfloat16", "int8", "float32"):
        stored = changed(run, features={"cache_dtype": dtype, "cache_dir": str(tmp_path / dtype)})
        write_cache(stored)
        materials = materials_of(stored)
        assert isinstance(materials.features, CachedFeatures)
        batch = next(steps_of(run, materials))
        features[dtype] = materials.features.batch_features(batch.tokens)
    assert features["bfloat16"].context.dtype == torch.bfloat16
    assert torch.equal(features["bfloat16"].context, features["float32"].context)
    assert not torch.equal(features["int8"].context, features["float32"].context)
    for dtype in ("bfloat16", "int8"):
        assert torch.equal(features[dtype].final, features["float32"].final)
