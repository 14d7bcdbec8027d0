"""Drafts through every checkpoint format and back: the same bytes, the same facts, or one line that says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from publishing_world import (
    KEPT_WORDS,
    TARGET,
    change_config,
    change_tensors,
    read_config,
    write_draft,
    write_llama_eagle3,
    write_speculators_dspark,
    write_zlab,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import deepspec
from deepspec.publishing.__main__ import main
from deepspec.publishing.formats import FORMATS, find_format
from deepspec.publishing.reading import read_folder
from deepspec.publishing.tables import SGLANG_TABLES
from deepspec.publishing.weights import read_tensors, write_tensors
from deepspec.targets import load_target_head

DSPARK = {"deepspec", "speculators", "sglang"}
HELD = {
    "dspark_vanilla": DSPARK,
    "dspark_gated": DSPARK,
    "dspark_rnn": DSPARK,
    "windowed": DSPARK,
    "dflash": {"deepspec", "speculators"},
    "fill_in": {"deepspec", "speculators", "zlab", "sglang", "transformers"},
    "eagle3": {"deepspec", "speculators"},
    "llama_eagle3": {"deepspec", "speculators", "eagle3"},
    "pruned_llama_eagle3": {"deepspec", "speculators", "eagle3"},
    "pruned": {"deepspec", "speculators"},
    "pruned_fill_in": {"deepspec", "speculators"},
}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; returns its one message."""

    def run(*words: str) -> str:
        assert main(words) == 2
        _, marker, message = capsys.readouterr().err.rpartition("error: ")
        assert marker
        assert len(message.splitlines()) == 1
        return message

    return run


def export(source: Path, name: str, output: Path, *words: str) -> None:
    assert main(["export", f"checkpoint={source}", f"format={name}", f"output_dir={output}", *words]) == 0


def import_back(source: Path, output: Path, *words: str) -> None:
    assert main(["import", f"path={source}", f"output_dir={output}", *words]) == 0


def bytes_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.dtype, t.shape, b"".join(t.chunks())) for name, t in read_tensors(folder).items()}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", HELD)
def test_there_and_back(kind: str, name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    source, there, back = write_draft(kind, tmp_path / "source"), tmp_path / "there", tmp_path / "back"
    change_config(source, target_fingerprint=load_target_head(str(TARGET)).fingerprint)
    if name not in HELD[kind]:
        assert f"format={name} " in refused("export", f"checkpoint={source}", f"format={name}", f"output_dir={there}")
        assert not there.exists()
        return
    export(source, name, there)
    import_back(there, back, f"target={TARGET}")
    assert bytes_of(back) == bytes_of(source)
    before, after = read_config(source), read_config(back)
    assert {key: after.get(key) for key in before if key != "transformers_version"} == {
        key: value for key, value in before.items() if key != "transformers_version"
    }
    assert after.keys() - before.keys() <= {"dflash_config"}
    loaded = deepspec.load_draft(back).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in load_file(source / "model.safetensors").items())


def test_what_the_speculators_layout_says(tmp_path: Path) -> None:
    export(write_draft("dspark_rnn", tmp_path / "a"), "speculators", tmp_path / "b")
    fields = read_config(tmp_path / "b")
    assert fields["speculators_model_type"] == fields["speculators_config"]["algorithm"] == "dspark"
    assert fields["aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert fields["sample_from_anchor"] is True
    assert fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    assert fields["speculators_config"]["verifier"] == {"name_or_path": "me/target", "architectures": []}
    assert fields["draft_vocab_size"] == fields["transformer_layer_config"]["vocab_size"] == 512
    assert fields["deepspec"]["rendering"]["template_options"] == {"thinking": False}
    assert "target_layer_ids" not in str(fields["deepspec"]), "what the layout holds is said once"


@pytest.mark.parametrize(
    ("kind", "tokens", "from_anchor"), [("dflash", 7, True), ("fill_in", 7, False), ("eagle3", 7, None)]
)
def test_tokens_a_round_of_the_speculators_layout(
    kind: str, tokens: int, from_anchor: bool | None, tmp_path: Path
) -> None:
    export(write_draft(kind, tmp_path / "a"), "speculators", tmp_path / "b", f"target={TARGET}")
    fields = read_config(tmp_path / "b")
    assert fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == tokens
    assert fields.get("sample_from_anchor") is from_anchor
    assert fields["speculators_config"]["verifier"]["architectures"] == ["Qwen3ForCausalLM"]
    if kind == "eagle3":
        assert fields["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3, 4, 5]
        assert not any(fields[name] for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"))


def test_transformers_drafts_with_what_is_exported_for_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.muse_glimmer_assistant", reason="Transformers before 5.24 does not draft")
    export(write_draft("fill_in", tmp_path / "a"), "transformers", tmp_path / "b")
    draft, report = AutoModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    target = AutoModelForCausalLM.from_pretrained(TARGET)
    ids = torch.arange(3, 11)[None]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    plain = target.generate(ids, **settings)
    assert torch.equal(plain, target.generate(ids, assistant_model=draft, speculation_type="dflash", **settings))


def test_a_draft_of_z_lab(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_zlab(tmp_path / "a")
    assert "give target=" in refused("import", f"path={source}", f"output_dir={tmp_path / 'b'}")
    assert not (tmp_path / "b").exists()
    import_back(source, tmp_path / "b", f"target={TARGET}")
    fields, head = read_config(tmp_path / "b"), load_target_head(str(TARGET))
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], head.embedding_weight)
    assert torch.equal(tensors["lm_head.weight"], head.head_weight)
    assert (fields["target_fingerprint"], fields["target_model_name_or_path"]) == (head.fingerprint, str(TARGET))
    assert (fields["mask_token_id"], fields["target_layer_ids"], fields["block_size"]) == (511, [1, 3, 4], 8)
    assert fields["rope_parameters"] == {"rope_theta": 1000000, "rope_type": "default"}
    assert fields["sample_from_anchor"] is False
    assert fields["dflash_config"]["causal"] is False


def test_a_draft_that_speculators_trained(tmp_path: Path) -> None:
    import_back(write_speculators_dspark(tmp_path / "a"), tmp_path / "b", f"target={TARGET}")
    draft, original = deepspec.load_draft(tmp_path / "b"), load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(draft.state_dict()[name], value) for name, value in original.items())
    assert (draft.config.markov_head_type, draft.config.target_layer_ids) == ("gated", [1, 3, 4])
    assert draft.config.target_model_name_or_path == str(TARGET)


def test_what_the_eagle3_layout_says(tmp_path: Path) -> None:
    export(write_draft("pruned_llama_eagle3", tmp_path / "a"), "eagle3", tmp_path / "b")
    fields, tensors = read_config(tmp_path / "b"), load_file(tmp_path / "b" / "model.safetensors")
    assert fields["architectures"] == ["LlamaForCausalLMEagle3"]
    assert fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2, 3, 4], "SGLang counts from 0"
    assert fields["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3, 4, 5], "vLLM counts from the embedding"
    assert (fields["num_aux_hidden_states"], fields["draft_vocab_size"]) == (5, len(KEPT_WORDS))
    assert {name for name in tensors if not name.startswith("midlayer.")} == {
        *("d2t", "t2d", "fc.weight", "norm.weight", "lm_head.weight")
    }
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (64, 128), "embedding and state side by side"
    assert (tensors["d2t"] + torch.arange(len(KEPT_WORDS))).tolist() == KEPT_WORDS


def test_an_eagle3_draft_of_others(tmp_path: Path, refused: Callable[..., str]) -> None:
    source, words = write_llama_eagle3(tmp_path / "a"), (f"path={tmp_path / 'a'}", f"output_dir={tmp_path / 'b'}")
    assert "import it with target=" in refused("import", *words)
    assert "a target of 6 layers has no usual ones" in refused("import", *words, f"target={TARGET}")
    change_config(source, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 4]})
    change_tensors(source, t2d=None)
    import_back(source, tmp_path / "b", f"target={TARGET}")
    draft, original = deepspec.load_draft(tmp_path / "b"), load_file(source / "model.safetensors")
    ours = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in original.items()}
    assert all(torch.equal(draft.state_dict()[name], tensor) for name, tensor in ours.items())
    assert draft.state_dict()["t2d"].nonzero().flatten().tolist() == KEPT_WORDS
    assert (draft.target_layer_ids, draft.draft_length, draft.config.num_target_layers) == ((1, 2, 4), 7, 6)
    assert draft.config.rope_parameters == {"rope_theta": 1000000, "rope_type": "default"}


def test_the_mapping_of_a_whole_vocabulary_is_left_out(tmp_path: Path, refused: Callable[..., str]) -> None:
    export(write_draft("llama_eagle3", tmp_path / "source"), "eagle3", tmp_path / "a")
    mapping = {"d2t": torch.zeros(512, dtype=torch.int64), "t2d": torch.ones(512, dtype=torch.bool)}
    import_back(change_tensors(tmp_path / "a", **mapping), tmp_path / "b", f"target={TARGET}")
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "source")
    mapping["d2t"][3] = 1
    change_tensors(tmp_path / "a", **mapping)
    assert "does not know: d2t" in refused("import", f"path={tmp_path / 'a'}", f"output_dir={tmp_path / 'c'}")


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"num_target_layers": 36}, [1, 17, 32]),
        ({"eagle_aux_hidden_state_layer_ids": [3, 19, 34]}, [2, 18, 33]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [18, 2, 33]}}, [2, 18, 33]),
    ],
)
def test_which_layers_an_eagle3_draft_of_others_reads(
    fields: dict[str, Any], layers: list[int], tmp_path: Path
) -> None:
    theirs = read_config(write_llama_eagle3(tmp_path / "a")) | fields
    assert FORMATS["eagle3"].from_config(theirs)["target_layer_ids"] == layers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_before_residual": True}, "norm_before_residual=true: DeepSpec has no Eagle3 with that"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc=true"),
        ({"fc_norm": True, "norm_output": True}, "fc_norm, norm_output=true"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=false"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2: DeepSpec has Eagle3 of one layer"),
        ({"layer_types": ["sliding_attention"]}, "DeepSpec has no Eagle3 with a window"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "DeepSpec has no such RoPE"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "no RoPE of a part of each head"),
        ({"target_hidden_size": 128}, "target_hidden_size=128"),
        ({"model_type": "llama4_text"}, "model_type=llama4_text"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true"),
        (
            {
                "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
                "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
            },
            "are not the same layers",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 4, 5]}, "fc.weight is [64, 192], expected [64, 256]"),
    ],
)
def test_eagle3_drafts_that_are_not_ours(
    changes: dict[str, Any], expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    source = change_config(write_llama_eagle3(tmp_path / "a"), **changes)
    message = refused("import", f"path={source}", f"output_dir={tmp_path / 'b'}", f"target={TARGET}")
    assert expected in message
    assert str(source) in message


def test_fields_nested_as_published_drafts_for_sglang_nest_them(tmp_path: Path) -> None:
    source = write_draft("dspark_rnn", tmp_path / "a")
    nested = {name: read_config(source)[name] for name in ("block_size", "mask_token_id", "markov_rank")}
    change_config(source, (*nested, "target_layer_ids"), architectures=["DSparkDraftModel"], dspark_config=nested)
    change_config(source, dflash_config={"target_layer_ids": [1, 3, 4]})
    import_back(source, tmp_path / "b")
    assert read_config(tmp_path / "b")["architectures"] == ["Qwen3DSparkModel"]
    assert deepspec.load_draft(tmp_path / "b").block_size == 7


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"embedding_scale": 8.0}, "does not scale its embedding"),
        ({"final_logit_softcapping": 30.0}, "does not cap its logits"),
        ({"target_model_name_or_path": None}, "does not name its target"),
        ({"target_model_name_or_path": "builtin"}, "give target=builtin"),
        ({"target_model_name_or_path": "/no/such/folder"}, "no such folder"),
        ({"target_gguf_file": "model.Q4_1.gguf"}, "GGUF file model.Q4_1.gguf"),
    ],
)
def test_what_the_speculators_layout_cannot_hold(
    changes: dict[str, Any], expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    source = change_config(write_draft("dspark_vanilla", tmp_path / "a"), **changes)
    message = refused("export", f"checkpoint={source}", "format=speculators", f"output_dir={tmp_path / 'b'}")
    assert expected in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dflash_config": {"conv_kernel_size": 4}}, "no draft with conv_kernel_size"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"dflash_config": {"target_layer_ids": [1, 3, 4]}}, "mask_token_id missing"),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [1], "causal": True}}, "do not see those behind"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "tensors missing"),
        ({"num_attention_heads": "four"}, "not the config of Qwen3-shaped layers"),
    ],
)
def test_drafts_of_z_lab_that_are_not_ours(
    changes: dict[str, Any], expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    source = change_config(write_zlab(tmp_path / "a"), **changes)
    message = refused("import", f"path={source}", f"output_dir={tmp_path / 'b'}", f"target={TARGET}")
    assert expected in message
    assert str(source) in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"speculators_model_type": "mtp"}, "speculators_model_type=mtp"),
        ({"sample_from_anchor": False}, "sample_from_anchor=false"),
        ({"target_hidden_size": 128}, "target_hidden_size=128"),
        ({"transformer_layer_config": {"model_type": "mistral"}}, "model_type=mistral"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids missing"),
    ],
)
def test_drafts_of_speculators_that_are_not_ours(
    changes: dict[str, Any], expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    source = change_config(write_speculators_dspark(tmp_path / "a"), **changes)
    message = refused("import", f"path={source}", f"output_dir={tmp_path / 'b'}", f"target={TARGET}")
    assert expected in message


def test_another_target_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = change_config(write_zlab(tmp_path / "a"), target_fingerprint="f00d" * 16)
    message = refused("import", f"path={source}", f"output_dir={tmp_path / 'b'}", f"target={TARGET}")
    assert "f00df00df00d" in message
    small = shutil.copytree(TARGET, tmp_path / "small")
    change_config(small, hidden_size=32)
    source = write_draft("dspark_vanilla", tmp_path / "c")
    words = (f"checkpoint={source}", "format=speculators", f"output_dir={tmp_path / 'd'}", f"target={small}")
    assert "its hidden_size is 32" in refused("export", *words)


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    source = write_draft("dspark_gated", tmp_path / "a")
    tensors = read_tensors(source)
    sharded = tmp_path / "b"
    sharded.mkdir()
    shutil.copy(source / "config.json", sharded)
    write_tensors(sharded, tensors, shard_bytes=100_000)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert deepspec.load_draft(sharded).block_size == 7, "as every reader reads them"
    export(sharded, "speculators", tmp_path / "c")
    assert bytes_of(tmp_path / "c") == bytes_of(source)


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_draft("dspark_vanilla", tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("deepspec.publishing.convert.write_tensors", full)
    words = ("export", f"checkpoint={source}", "format=sglang", f"output_dir={tmp_path / 'b'}")
    assert "No space left" in refused(*words)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]
    monkeypatch.undo()
    (tmp_path / ".b.tmp").mkdir()
    (tmp_path / ".b.tmp" / "half").write_text("of a killed writer", encoding="utf-8")
    assert main(words) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_folders_that_hold_something_are_left_alone(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_draft("dspark_vanilla", tmp_path / "a")
    other = write_draft("dspark_rnn", tmp_path / "b")
    before = bytes_of(other)
    assert "is not empty" in refused("export", f"checkpoint={source}", "format=sglang", f"output_dir={other}")
    assert bytes_of(other) == before
    assert "Did you mean 'sglang'?" in refused("export", f"checkpoint={source}", "format=sglan", "output_dir=x")


CALIBRATION = {
    "temperatures": [1.0, 1.2, 0.9, 1.0, 1.0, 1.5, 1.0],
    "positions": [{"k": k, "before": {"ece": 0.2}, "held_out": {"ece": 0.1}} for k in range(1, 8)],
    "rounds": 900,
    "source": {"sets": {"chat": 30, "math": 30}},
}
SPS = {
    "points": [{"tokens": 1, "steps_per_second": 50.0, "rows": 1}, {"tokens": 8, "steps_per_second": 40.0, "rows": 1}],
    "rows": [{"rows": 1, "draft_seconds": 0.001}],
    "machine": {"cpu": "Some CPU"},
}


def test_calibration_and_sps_table_in_sglangs_form_and_back(tmp_path: Path) -> None:
    source = write_draft("dspark_vanilla", tmp_path / "a")
    (source / "calibration.json").write_text(json.dumps(CALIBRATION), encoding="utf-8")
    (source / "sps.json").write_text(json.dumps(SPS), encoding="utf-8")
    export(source, "sglang", tmp_path / "b")
    sts = json.loads((tmp_path / "b" / "dspark_sts.json").read_text(encoding="utf-8"))
    assert sts["temperatures"] == CALIBRATION["temperatures"]
    assert (sts["dataset"], sts["num_samples"]) == ("chat, math", 900)
    assert (sts["ece_before"], sts["ece_after"]) == ([0.2] * 7, [0.1] * 7)
    table = json.loads((tmp_path / "b" / "dspark_sps.json").read_text(encoding="utf-8"))
    assert table["sample_batch_tokens"] == [1, 8]
    assert table["sample_steps_per_sec"] == [50.0, 40.0]
    assert table["max_batch_tokens"] == 8
    assert not (tmp_path / "b" / "calibration.json").exists()
    import_back(tmp_path / "b", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "calibration.json").read_text(encoding="utf-8")) == CALIBRATION
    assert json.loads((tmp_path / "c" / "sps.json").read_text(encoding="utf-8")) == SPS


def test_tables_that_sglang_itself_wrote(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_draft("dspark_vanilla", tmp_path / "a")
    sts, sps = (file.name for file in SGLANG_TABLES.files)
    (source / sts).write_text('{"temperatures": [1, 2, 1, 1, 1, 1, 1], "dataset": "gsm8k"}', encoding="utf-8")
    written = {"sample_batch_tokens": [1, 16], "sample_steps_per_sec": [9.0, 8.0], "max_batch_tokens": 64}
    (source / sps).write_text(json.dumps(written), encoding="utf-8")
    import_back(source, tmp_path / "b")
    calibration = json.loads((tmp_path / "b" / "calibration.json").read_text(encoding="utf-8"))
    assert calibration["temperatures"] == [1, 2, 1, 1, 1, 1, 1]
    points = json.loads((tmp_path / "b" / "sps.json").read_text(encoding="utf-8"))["points"]
    assert points == [{"tokens": 1, "steps_per_second": 9.0}, {"tokens": 16, "steps_per_second": 8.0}]
    (source / sps).write_text(json.dumps(written | {"sample_batch_tokens": [16, 1]}), encoding="utf-8")
    assert sps in refused("import", f"path={source}", f"output_dir={tmp_path / 'c'}")


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "not a readable config"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x09" * 40), "no safetensors file, or damaged"),
        (lambda folder: change_tensors(folder, norm__weight=None), "tensors missing for its config.json: norm.weight"),
        (lambda folder: change_tensors(folder, extra=torch.zeros(1)), "does not know: extra"),
        (lambda folder: change_tensors(folder, norm__weight=torch.zeros(3)), "norm.weight is [3], expected [64]"),
        (lambda folder: change_config(folder, ("block_size",)), "block_size"),
        (lambda folder: change_config(folder, architectures=["Other"]), "no draft that DeepSpec knows (Other"),
    ],
)
def test_damaged_drafts_are_refused(
    break_it: Callable[[Path], Any], expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    source = write_draft("dspark_vanilla", tmp_path / "a")
    break_it(source)
    words = ("export", f"checkpoint={source}", "format=deepspec", f"output_dir={tmp_path / 'b'}")
    assert expected in refused(*words)


def test_a_mapping_of_another_number_format_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_draft("pruned", tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"d2t": tensors["d2t"].int()}, source / "model.safetensors")
    message = refused("export", f"checkpoint={source}", "format=speculators", f"output_dir={tmp_path / 'b'}")
    assert "d2t is stored as I32, readers want I64" in message


def test_a_mask_token_of_its_own_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_zlab(tmp_path / "a")
    (source / "mask_embedding.pt").write_bytes(b"\x80")
    message = refused("import", f"path={source}", f"output_dir={tmp_path / 'b'}", f"target={TARGET}")
    assert "mask_embedding.pt: DeepSpec has no draft with an embedding beside" in message


def test_truncated_files_are_found_from_their_header(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_draft("dspark_vanilla", tmp_path / "a")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-100])
    words = ("export", f"checkpoint={source}", "format=deepspec", f"output_dir={tmp_path / 'b'}")
    assert "ends before its last tensor" in refused(*words)


def test_every_format_is_found_by_itself(tmp_path: Path) -> None:
    source = write_draft("fill_in", tmp_path / "a")
    export(write_draft("llama_eagle3", tmp_path / "b"), "eagle3", tmp_path / "eagle3")
    assert find_format(read_folder(tmp_path / "eagle3")).name == "eagle3"
    for name in ("deepspec", "speculators", "zlab", "transformers"):
        export(source, name, tmp_path / name)
        assert find_format(read_folder(tmp_path / name)).name == name
