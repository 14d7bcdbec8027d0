"""`python -m deepspec.publishing check`: good, broken and foreign folders, read as engines read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

from deepspec.drafts import DSparkModel
from deepspec.publishing.__main__ import main

Check = Callable[..., tuple[int, str]]
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Check a folder: the exit status and what was printed."""

    def run(path: Path, engine: str | None = None) -> tuple[int, str]:
        status = main(["check", f"path={path}", *([f"engine={engine}"] if engine else [])])
        return status, capsys.readouterr().out

    return run


def exported(kind: str, name: str, tmp_path: Path) -> Path:
    source = write_draft(kind, tmp_path / "source")
    assert main(["export", f"checkpoint={source}", f"format={name}", f"output_dir={tmp_path / 'out'}"]) == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("kind", "name", "engines"),
    [
        ("dspark_vanilla", "deepspec", {"vllm", "sglang"}),
        ("dspark_vanilla", "speculators", {"vllm", "speculators"}),
        ("dspark_rnn", "sglang", {"sglang"}),
        ("dspark_rnn", "speculators", {"speculators"}),
        ("windowed", "sglang", {"sglang"}),
        ("dflash", "deepspec", set()),
        ("dflash", "speculators", {"speculators"}),
        ("fill_in", "deepspec", {"vllm", "sglang", "speculators"}),
        ("fill_in", "zlab", {"vllm", "sglang", "speculators"}),
        ("fill_in", "transformers", {"vllm", "sglang", "transformers"}),
        ("fill_in", "speculators", {"vllm", "speculators"}),
        ("eagle3", "deepspec", set()),
        ("eagle3", "speculators", {"vllm", "speculators"}),
        ("llama_eagle3", "deepspec", set()),
        ("llama_eagle3", "speculators", {"vllm", "speculators"}),
        ("pruned_llama_eagle3", "eagle3", {"vllm", "sglang"}),
        ("pruned", "deepspec", {"vllm"}),
        ("pruned", "speculators", {"vllm", "speculators"}),
        ("pruned_fill_in", "deepspec", {"vllm"}),
    ],
)
def test_who_would_serve_what(kind: str, name: str, engines: set[str], tmp_path: Path, check: Check) -> None:
    folder = exported(kind, name, tmp_path)
    for engine in ("vllm", "sglang", "transformers", "speculators"):
        status, printed = check(folder, engine)
        assert (status == 0) is (engine in engines), printed
        assert ("FAIL" in printed) is (status == 1)
    assert check(folder)[0] == (0 if engines else 1)


def with_layers(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    """Change the section of the layers in the speculators layout."""
    section = read_config(folder)["transformer_layer_config"] | changes
    return change_config(folder, transformer_layer_config={k: v for k, v in section.items() if k not in remove})


@pytest.mark.parametrize(
    ("kind", "name", "change", "engine", "expected"),
    [
        ("dspark_vanilla", "speculators", (("sample_from_anchor",), {}), "vllm", "sample_from_anchor is missing"),
        ("fill_in", "speculators", ((), {"sliding_window_non_causal": False}), "vllm", "by sliding_window_non_causal"),
        ("dspark_vanilla", "deepspec", (("markov_head_type",), {}), "sglang", "markov_head_type is missing"),
        ("dspark_vanilla", "deepspec", ((), {"num_target_layers": 4}), "vllm", "[1, 3, 4] are out of range"),
        (
            "dspark_vanilla",
            "deepspec",
            ((), {"target_layer_ids": [-1, 3, 4]}),
            "sglang",
            "cannot capture the embedding",
        ),
        ("dspark_vanilla", "deepspec", ((), {"embedding_scale": 8.0}), "sglang", "does not scale its embedding"),
        ("windowed", "sglang", (("is_causal",), {}), "sglang", "sliding layers are causal"),
        ("dspark_vanilla", "speculators", ((), {"speculators_config": {"verifier": {}}}), "speculators", "no verifier"),
        ("dspark_vanilla", "sglang", ((), {"block_size": 5}), "sglang", "has 7 temperatures, the draft proposes 5"),
        ("dspark_vanilla", "deepspec", ((), {"rope_parameters": DYNAMIC_ROPE}), "vllm", "type dynamic"),
        ("llama_eagle3", "eagle3", (("eagle_aux_hidden_state_layer_ids",), {}), "vllm", "write [1, 2, 3, 4, 5] there"),
        ("llama_eagle3", "eagle3", (("eagle_config",), {}), "sglang", "write [0, 1, 2, 3, 4] there"),
        ("llama_eagle3", "eagle3", (("eagle_config", "num_aux_hidden_states"), {}), "vllm", "of 3 captured layers"),
        (
            "llama_eagle3",
            "eagle3",
            ((), {"architectures": ["Eagle3LlamaForCausalLM"]}),
            "sglang",
            "write architectures",
        ),
        ("llama_eagle3", "eagle3", ((), {"target_hidden_size": None}), "sglang", "target_hidden_size null"),
        ("llama_eagle3", "eagle3", (("draft_vocab_size",), {}), "sglang", "wants draft_vocab_size"),
    ],
)
def test_traps_of_fields(
    kind: str, name: str, change: tuple[tuple[str, ...], dict[str, Any]], engine: str, expected: str, tmp_path: Path,
    check: Check,
) -> None:  # fmt: skip
    folder = exported(kind, name, tmp_path)
    if "temperatures" in expected:
        (folder / "dspark_sts.json").write_text('{"temperatures": [1, 1, 1, 1, 1, 1, 1]}', encoding="utf-8")
    assert expected not in check(folder, engine)[1]
    status, printed = check(change_config(folder, change[0], **change[1]), engine)
    assert expected in printed
    assert status == (0 if "dynamic" in expected else 1)


def test_how_many_layers_the_speculators_layout_says_of_a_llama_shape(tmp_path: Path, check: Check) -> None:
    folder = exported("llama_eagle3", "speculators", tmp_path)
    assert check(folder, "vllm")[0] == 0
    status, printed = check(with_layers(folder, ("num_aux_hidden_states",)), "vllm")
    assert status == 1
    assert "takes it for a draft of 3 captured layers and it has 5" in printed


def test_a_window_in_the_speculators_layout_is_causal_to_vllm_unless_said(tmp_path: Path, check: Check) -> None:
    folder = exported("windowed", "speculators", tmp_path)
    change_config(folder, markov_head_type="vanilla", deepspec={})
    change_tensors(folder, **{"markov_head__joint_proj__weight": None, "markov_head__joint_proj__bias": None})
    assert check(folder, "vllm")[0] == 0
    status, printed = check(with_layers(folder, ("is_causal",)), "vllm")
    assert status == 1
    assert '"is_causal": false in transformer_layer_config' in printed


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("dflash-drafts/a", "dspark_vanilla", "from the path it would guess dflash"),
        ("eagle3_compared/a", "fill_in", "from the path it would guess eagle3"),
        ("a", "fill_in", 'method must be given: "method": "dflash"'),
        ("a", "dspark_vanilla", "method dspark, also where none is given"),
    ],
)
def test_what_vllm_would_guess_from_the_path(path: str, kind: str, expected: str, tmp_path: Path, check: Check) -> None:
    status, printed = check(write_draft(kind, tmp_path / path), "vllm")
    assert expected in printed
    assert status == 0


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda folder: (folder / "config.json").write_text("[]"), "not a readable config"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "no safetensors file, or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: change_tensors(folder, fc__weight=torch.zeros(64, 64)), "fc.weight is [64, 64]"),
        (lambda folder: change_tensors(folder, norm__weight=None), "tensors missing"),
        (lambda folder: change_config(folder, hidden_size="wide"), "config.json: a field is missing or wrong"),
        (lambda folder: change_config(folder, target_layer_ids=None), "target_layer_ids missing"),
        (lambda folder: change_config(folder, model_type="bert"), "model_type=bert: a draft's is one of"),
    ],
)
def test_damaged_folders(break_it: Callable[[Path], Any], expected: str, tmp_path: Path, check: Check) -> None:
    folder = write_draft("dspark_vanilla", tmp_path / "a")
    break_it(folder)
    status, printed = check(folder)
    assert status == 1
    assert expected in printed
    assert printed.endswith("would fail: vLLM, SGLang, Transformers, speculators\n")


def test_a_vocabulary_that_names_tokens_instead_of_offsets(tmp_path: Path, check: Check) -> None:
    folder = write_draft("pruned", tmp_path / "a")
    assert check(folder, "vllm")[0] == 0
    status, printed = check(change_tensors(folder, d2t=torch.tensor(KEPT_WORDS)), "vllm")
    assert status == 1
    assert "these are not offsets" in printed


@pytest.mark.parametrize("write", [partial(write_draft, "fill_in"), write_speculators_dspark, write_llama_eagle3])
def test_no_field_of_a_wrong_type_ends_in_a_traceback(
    write: Callable[[Path], Path], tmp_path: Path, check: Check
) -> None:
    folder = write(tmp_path / "a")
    fields = read_config(folder)
    for name in fields:
        for wrong in (None, "x", {"a": 1}, [1, "a"], -3):
            change_config(folder, **{name: wrong})
            assert check(folder)[0] in (0, 1)
        change_config(folder, **{name: fields[name]})


def test_folders_without_a_draft(tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    empty, pickle, cache = tmp_path / "empty", tmp_path / "pickle", tmp_path / "models--me--draft"
    empty.mkdir()
    write_draft("dspark_vanilla", cache / "snapshots" / "f00d")
    write_draft("dspark_vanilla", pickle)
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    for folder, expected in (
        (empty, "empty: empty"),
        (pickle, "pytorch_model.bin, which may run code"),
        (cache, str(Path("snapshots") / "f00d")),
        (TARGET, "a language model (Qwen3ForCausalLM), no draft"),
    ):
        status, printed = check(folder)
        assert status == 1
        assert expected in printed
    assert main(["check", f"path={tmp_path / 'nothing'}"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["check", f"path={empty}", "engine=vlm"]) == 2
    assert "Did you mean 'vllm'?" in capsys.readouterr().err


def test_pickles_beside_safetensors_are_only_mentioned(tmp_path: Path, check: Check) -> None:
    folder = write_draft("fill_in", tmp_path / "a")
    (folder / "mask_embedding.pt").write_bytes(b"\x80")
    status, printed = check(folder, "vllm")
    assert status == 0
    assert "care  mask_embedding.pt may run code" in printed
    assert "takes the place of the mask token's row" in printed


def test_other_peoples_drafts(tmp_path: Path, check: Check) -> None:
    zlab = write_zlab(tmp_path / "z")
    status, printed = check(zlab)
    assert status == 0
    assert "would fail: Transformers\n" in printed
    trained = write_speculators_dspark(tmp_path / "s")
    assert check(trained, "speculators")[0] == 0
    status, printed = check(trained, "vllm")
    assert status == 1
    assert "only the vanilla sequential head (markov_head_type=gated)" in printed


def test_eagle3_of_another_family(tmp_path: Path, check: Check) -> None:
    status, printed = check(write_llama_eagle3(tmp_path / "a"))
    assert status == 0
    assert "LlamaForCausalLMEagle3 runs under method eagle3" in printed
    assert "pruned vocabulary of 201 words" in printed
    assert "DeepSpec cannot import it" in printed
    assert "import it with target=" in printed
    status, printed = check(write_llama_eagle3(tmp_path / "b", torch.int32), "vllm")
    assert status == 1
    assert "d2t is I32 [201], it wants I64 [201]" in printed


def test_other_types_of_speculators(tmp_path: Path, check: Check) -> None:
    folder = change_config(write_speculators_dspark(tmp_path / "a"), speculators_model_type="xpress")
    assert check(folder, "speculators")[0] == 0
    status, printed = check(folder, "vllm")
    assert status == 1
    assert "has no speculators_model_type xpress" in printed


def test_gemma4_drafts(tiny_draft: Callable[..., DSparkModel], tmp_path: Path, check: Check) -> None:
    tiny_draft("gemma4", markov_rank=0, confidence_head=False, algorithm="dflash").save_pretrained(tmp_path / "a")
    status, printed = check(tmp_path / "a")
    assert status == 1
    assert "SGLang 0.5.23:\n  FAIL  has no Gemma4DSparkModel" in printed
    tiny_draft("gemma4", {"final_logit_softcapping": None}).save_pretrained(tmp_path / "b")
    assert check(tmp_path / "b", "vllm")[0] == 0
