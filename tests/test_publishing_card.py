"""The model card says what the files of the run say, in numbers and in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from deepspec.checkpoints import write_checkpoint
from deepspec.decoding import Completion, Round
from deepspec.drafts import DSparkModel
from deepspec.evaluation.records import Decoding, Record
from deepspec.evaluation.summary import results_of, write_results
from deepspec.files import sha256_of
from deepspec.publishing.__main__ import main
from deepspec.publishing.target_names import is_hub_id, target_title

PNG = b"\x89PNG\r\n\x1a\n" + b"picture"
DraftMaker = Callable[..., DSparkModel]


@pytest.fixture
def publish(tmp_path: Path, tiny_draft: DraftMaker) -> Callable[..., ModelCard]:
    """Publish a tiny draft (its config changed by `changes`) in a dry run; returns the card."""

    def run(*words: str, **changes: Any) -> ModelCard:
        folder = tmp_path / "draft"
        if changes or not folder.exists():
            tiny_draft(**changes).save_pretrained(folder)
        command = ["push", f"checkpoint={folder}", "repo_id=me/my-draft", "dry_run=true"]
        assert main([*command, f"output_dir={tmp_path / 'hub'}", *words]) == 0
        return ModelCard.load(tmp_path / "hub" / "README.md")

    return run


def chunk(set_name: str, temperature: float, start: int, accepted: list[int]) -> Record:
    """One prompt decoded in rounds of five proposals, at twice the plain speed."""
    rounds = [Round(proposed=5, accepted=n, emitted=n + 1, confidences=None) for n in accepted]
    tokens = list(range(1 + sum(n + 1 for n in accepted)))
    fast, slow = Decoding(1.0, [Completion(tokens, rounds, "stop")]), Decoding(2.0, [Completion(tokens, [], "stop")])
    return Record(set_name, temperature, start, "digest", speculative=fast, plain=slow)


def write_evaluation(folder: Path, draft_folder: Path, **changes: Any) -> Path:
    """The files of an evaluation on sets chat and math at temperatures 1 and 0."""
    records = [
        chunk(name, temperature, start, accepted)
        for temperature in (1.0, 0.0)
        for name, of_prompts in {"math": [[4, 2, 0], [5, 1]], "chat": [[0, 0], [1, 1]]}.items()
        for start, accepted in enumerate(of_prompts)
    ]
    metrics: dict[str, Any] = {
        "draft": {
            "folder": str(draft_folder),
            "weights": {file.name: sha256_of(file) for file in draft_folder.glob("*.safetensors")},
        },
        "target": {"path": "builtin", "fingerprint": None},
        "results": results_of(
            records,
            sets=["math", "chat"],
            temperatures=[1.0, 0.0],
            block_size=5,
            baseline=True,
            bootstrap_samples=50,
            skipped={"math": 0, "chat": 0},
            seed=0,
        ),
        "settings": {"decode.max_new_tokens": 64, "decode.verification": "token", "target.dtype": "float32"},
        "machine": {"cpu": "Some CPU", "torch_threads": 2, "accelerator": None},
    }
    samples = [
        {"set": "math", "temperature": 0.0, "prompt": "cold", "text": "cold"},
        {"set": "math", "temperature": 1.0, "prompt": "What is 1 + 1?", "text": "It is 2.\n```\nend"},
        {"set": "math", "temperature": 1.0, "prompt": "the second of its set", "text": "unused"},
        {"set": "chat", "temperature": 1.0, "prompt": "Say hello.", "text": "Hello!"},
    ]
    write_results(folder, metrics | changes, samples)
    return folder


def test_results_are_those_of_the_evaluation(publish: Callable[..., ModelCard], tmp_path: Path) -> None:
    publish()
    folder = write_evaluation(tmp_path / "eval", tmp_path / "draft")
    text = publish(f"evaluation={folder}").text
    measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"]
    tau = measured[0]["sets"]["math"]["tau"]
    assert tau["value"] == pytest.approx((5 + 3 + 1 + 6 + 2) / 5)
    assert f"| 1 | math | 2 | 3.40 ({tau['low']:.2f} to {tau['high']:.2f}) | 0.57 | 2.00 (2.00 to 2.00) |" in text
    assert "| 0.80, 0.75, 0.67, 1.00, 0.50 |" in text
    assert "| 0 | chat | 2 | 1.50 (1.00 to 2.00) | 0.25 | 2.00 (2.00 to 2.00) | 0.50, 0.00, -, -, - |" in text
    assert "| 1 | mean of sets |  | 2.45 (" in text
    assert "Measured on: Some CPU, 2 threads; New tokens per prompt, at most: 64; Verification rule: token;" in text
    assert "not been evaluated" not in text


def test_samples_are_the_first_of_each_set_at_the_highest_temperature(
    publish: Callable[..., ModelCard], tmp_path: Path
) -> None:
    publish()
    text = publish(f"evaluation={write_evaluation(tmp_path / 'eval', tmp_path / 'draft')}").text
    assert "```text\nWhat is 1 + 1?\n```" in text
    assert "````text\nIt is 2.\n```\nend\n````" in text, "a fence in the text must not end the block"
    assert "Hello!" in text
    assert "cold" not in text
    assert "the second of its set" not in text


def test_without_an_evaluation_the_card_claims_nothing(publish: Callable[..., ModelCard]) -> None:
    text = publish().text
    assert "**This draft has not been evaluated.**" in text
    assert "| Temperature |" not in text
    assert "Sample output" not in text


def test_metadata_and_facts(publish: Callable[..., ModelCard]) -> None:
    card = publish(
        "license=mit",
        target_model_name_or_path="Qwen/Qwen3-4B",
        target_revision="abc123",
        target_fingerprint="f00d" * 16,
        markov_head_type="gated",
    )
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen3-4B",
        "library_name": "deepspec",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", "dspark"],
    }
    for fact in (
        "| Target revision | `abc123` |",
        f"| Target fingerprint | `{'f00d' * 16}` |",
        "| Draft layers | 2 |",
        "| Block size | 5 |",
        "| Captured target layers | [0, 2, 4] of 6 (0-based) |",
        "| Markov head | gated, rank 8 |",
        "| Confidence head | yes (reads the Markov embedding too) |",
        'load_target("Qwen/Qwen3-4B", revision="abc123")',
        'deepspec.load_draft("me/my-draft", target=target)',
        "eval.py checkpoint=me/my-draft target.path=Qwen/Qwen3-4B target.revision=abc123",
    ):
        assert fact in card.text


def test_dflash_on_the_builtin_target(publish: Callable[..., ModelCard]) -> None:
    card = publish(
        algorithm="dflash",
        markov_rank=0,
        confidence_head=False,
        confidence_head_with_markov=False,
        target_model_name_or_path="builtin",
    )
    metadata = card.data.to_dict()
    assert metadata["tags"][-1] == "dflash"
    assert "base_model" not in metadata
    assert "license" not in metadata
    assert "| Markov head | none |\n| Confidence head | none |" in card.text
    assert 'load_target("builtin")' in card.text


def test_training_settings_come_from_the_run_and_show_no_folders(tmp_path: Path, goldens: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, 30, lambda folder: shutil.copytree(goldens / "ckpt_dflash", folder / "draft"), {})
    config = (
        "train: {steps: 30, epochs: 10.0, lr: 0.0006, loss: {ce: 1.0}}\ndata: {train_files: [/secret/train.jsonl]}\n"
    )
    (run / "config.yaml").write_text(config, encoding="utf-8")
    out = tmp_path / "hub"
    assert main(["push", f"checkpoint={run}", "repo_id=me/d", "dry_run=true", f"output_dir={out}"]) == 0
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "| Optimizer steps done | 30 |" in text
    assert "| Peak learning rate | 0.0006 |" in text
    assert "| Weight of cross-entropy | 1.0 |" in text
    assert "| Training data | `train.jsonl` |" in text
    assert "| Epochs |" not in text, "steps were given, so epochs had no effect"
    assert "/secret" not in text
    assert str(tmp_path) not in text


def test_names_of_targets(tmp_path: Path) -> None:
    assert is_hub_id("Qwen/Qwen3-4B")
    assert not any(map(is_hub_id, (None, "builtin", "/models/target", "a/b/c", "../target", str(tmp_path))))
    assert target_title("/home/someone/models/target") == "`target` (a local model)"


def test_plot_of_the_evaluation_is_shown(publish: Callable[..., ModelCard], tmp_path: Path) -> None:
    publish()
    folder = write_evaluation(tmp_path / "eval", tmp_path / "draft")
    assert "tau.png" not in publish(f"evaluation={folder}").text
    (folder / "tau.png").write_bytes(PNG)
    assert "](tau.png)" in publish(f"evaluation={folder}").text
    assert (tmp_path / "hub" / "tau.png").read_bytes() == PNG


def test_plot_of_a_report_beside_it_is_shown_only_if_it_reports_this_draft(
    publish: Callable[..., ModelCard], tmp_path: Path
) -> None:
    publish()
    folder, report = write_evaluation(tmp_path / "eval", tmp_path / "draft"), tmp_path / "report"
    report.mkdir()
    (report / "tau.png").write_bytes(PNG)
    (report / "metrics.json").write_text('{"weights": "another"}', encoding="utf-8")
    assert "tau.png" not in publish(f"evaluation={folder}").text
    shutil.copy(folder / "metrics.json", report)
    assert "](tau.png)" in publish(f"evaluation={folder}").text


def test_given_plots_must_be_pictures(
    publish: Callable[..., ModelCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, text = tmp_path / "my.png", tmp_path / "text.png"
    picture.write_bytes(PNG)
    text.write_text("no picture", encoding="utf-8")
    assert "](tau.png)" in publish(f"plot={picture}").text
    command = ["push", f"checkpoint={tmp_path / 'draft'}", "repo_id=me/d", "dry_run=true"]
    assert main([*command, f"plot={text}"]) == 2
    assert "not a PNG" in capsys.readouterr().err
    assert main([*command, f"plot={tmp_path / 'none.png'}"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_evaluations_of_other_weights_are_refused(
    publish: Callable[..., ModelCard], tmp_path: Path, goldens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish()
    folder = write_evaluation(tmp_path / "eval", goldens / "ckpt_dflash")
    command = ["push", f"checkpoint={tmp_path / 'draft'}", "repo_id=me/d", "dry_run=true", f"evaluation={folder}"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "measured other weights" in message
    assert str(goldens / "ckpt_dflash") in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "damaged"), ("[]", "damaged"), ("{}", "'draft'"), (None, "no metrics.json there")],
)
def test_damaged_evaluations_are_refused(
    publish: Callable[..., ModelCard],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    expected: str,
) -> None:
    publish()
    if content is not None:
        (tmp_path / "metrics.json").write_text(content, encoding="utf-8")
    command = ["push", f"checkpoint={tmp_path / 'draft'}", "repo_id=me/d", "dry_run=true", f"evaluation={tmp_path}"]
    assert main(command) == 2
    assert expected in capsys.readouterr().err


def test_empty_results_and_damaged_samples_are_refused(
    publish: Callable[..., ModelCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish()
    folder = write_evaluation(tmp_path / "eval", tmp_path / "draft", results=[])
    command = ["push", f"checkpoint={tmp_path / 'draft'}", "repo_id=me/d", "dry_run=true", f"evaluation={folder}"]
    assert main(command) == 2
    assert "holds no results" in capsys.readouterr().err
    write_evaluation(folder, tmp_path / "draft")
    (folder / "samples.jsonl").write_text('{"set": "math"}\n', encoding="utf-8")
    assert main(command) == 2
    assert "samples.jsonl" in capsys.readouterr().err
