"""`python -m deepspec.publishing push`: what is written, what is sent, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file

import deepspec
from deepspec.checkpoints import write_checkpoint
from deepspec.publishing.__main__ import main

UPLOAD = "deepspec.publishing.upload"
REPO = "repo_id=me/my-draft"


@pytest.fixture
def draft_folder(goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(goldens / "ckpt_dspark_vanilla", tmp_path / "draft"))


@pytest.fixture
def run_folder(goldens: Path, tmp_path: Path) -> Path:
    """A training run whose checkpoints 10 and 20 hold different drafts."""
    for step, name in ((10, "dspark_rnn"), (20, "dspark_gated")):
        write_checkpoint(
            tmp_path / "run", step, lambda folder, n=name: shutil.copytree(goldens / f"ckpt_{n}", folder / "draft"), {}
        )
    return tmp_path / "run"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; returns its one message."""

    def run(*words: str) -> str:
        assert main(["push", *words]) == 2
        _, marker, message = capsys.readouterr().err.rpartition("error: ")
        assert marker
        assert len(message.splitlines()) == 1
        return message

    return run


class FakeHub:
    """Records what would go over the network."""

    def __init__(self, private: bool = True, failure: Exception | None = None):
        self.private, self.failure, self.calls = private, failure, []

    def __call__(self, **_: Any) -> FakeHub:
        return self

    def create_repo(self, repo_id: str, **arguments: Any) -> RepoUrl:
        if self.failure:
            raise self.failure
        self.calls.append(("create_repo", repo_id, arguments))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def repo_info(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def create_branch(self, repo_id: str, **arguments: Any) -> None:
        self.calls.append(("create_branch", repo_id, arguments))

    def upload_folder(self, *, repo_id: str, **arguments: Any) -> None:
        self.calls.append(("upload_folder", repo_id, arguments))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def install(**settings: Any) -> FakeHub:
        fake = FakeHub(**settings)
        monkeypatch.setattr(f"{UPLOAD}.HfApi", fake)
        monkeypatch.setattr(f"{UPLOAD}.get_token", lambda: "hf_test")
        return fake

    return install


def test_dry_run_writes_a_folder_that_loads_as_the_same_draft(
    run_folder: Path, tmp_path: Path, goldens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run must not reach for the Hub or a token")

    monkeypatch.setattr(f"{UPLOAD}.HfApi", no_network)
    monkeypatch.setattr(f"{UPLOAD}.get_token", no_network)
    out = tmp_path / "hub"
    command = ["push", f"checkpoint={run_folder}", REPO, "dry_run=true", f"output_dir={out}"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "me/my-draft (private)" in printed
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for file in out.iterdir():
        assert file.name in printed
    assert f"{(out / 'model.safetensors').stat().st_size / 1024:.1f} KiB" in printed

    loaded = deepspec.load_draft(out).state_dict()
    newest = load_file(goldens / "ckpt_dspark_gated" / "model.safetensors")
    assert loaded.keys() == newest.keys()
    assert all(torch.equal(loaded[name], newest[name]) for name in newest)
    assert main(command) == 0, "an earlier folder of the same command is replaced"


def test_a_calibration_is_published_with_its_draft(run_folder: Path, tmp_path: Path) -> None:
    checkpoint, out = run_folder / "checkpoints" / "step-00000010", tmp_path / "hub"
    calibration = checkpoint / "draft" / "calibration.json"
    calibration.write_text('{"temperatures": [1.5]}')
    (checkpoint / "draft" / "sps.json").write_text("{}")  # of this machine alone
    command = ["push", f"checkpoint={checkpoint}", REPO, "dry_run=true", f"output_dir={out}"]
    assert main(command) == 0
    assert (out / "calibration.json").read_bytes() == calibration.read_bytes()
    assert not (out / "sps.json").exists()
    assert main(command) == 0, "an earlier folder of the same command is replaced"


def test_named_checkpoint_is_published_instead_of_the_newest(run_folder: Path, tmp_path: Path, goldens: Path) -> None:
    checkpoint, out = run_folder / "checkpoints" / "step-00000010", tmp_path / "hub"
    assert main(["push", f"checkpoint={checkpoint}", REPO, "dry_run=true", f"output_dir={out}"]) == 0
    published, original = out / "model.safetensors", goldens / "ckpt_dspark_rnn" / "model.safetensors"
    assert published.read_bytes() == original.read_bytes()
    assert "| Optimizer steps done | 10 |" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["speculators", "sglang"])
def test_a_draft_is_published_in_another_format(
    draft_folder: Path, tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    (draft_folder / "calibration.json").write_text('{"temperatures": [1, 1, 1, 1, 1, 1, 1.5]}')
    (draft_folder / "sps.json").write_text('{"points": [{"tokens": 1, "steps_per_second": 9.0}]}')
    out = tmp_path / "hub"
    command = ["push", f"checkpoint={draft_folder}", REPO, "dry_run=true", f"output_dir={out}", f"format={name}"]
    if name == "speculators":
        assert "is not on the Hub; give its Hub id with target=" in refused(*command[1:])
        assert not out.exists()
        command.append("target=me/target")
    assert main(command) == 0
    calibration = {"speculators": "calibration.json", "sglang": "dspark_sts.json"}[name]
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["README.md", "config.json", "model.safetensors", calibration]
    ), "an SPS table is of one machine"
    assert main(command) == 0, "an earlier folder of the same command is replaced"
    assert main(["import", f"path={out}", f"output_dir={tmp_path / 'back'}"]) == 0
    loaded = deepspec.load_draft(tmp_path / "back").state_dict()
    original = load_file(draft_folder / "model.safetensors")
    assert all(torch.equal(loaded[key], weight) for key, weight in original.items())


def test_an_eagle3_draft_is_published_for_vllm(goldens: Path, tmp_path: Path) -> None:
    command = ["push", f"checkpoint={goldens / 'ckpt_eagle3'}", REPO, "dry_run=true", f"output_dir={tmp_path / 'hub'}"]
    assert main([*command, "format=speculators", "target=me/target"]) == 0
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert '"method": "eagle3", "model": "me/my-draft"' in card
    assert "| Tokens drafted a round | 7 |" in card
    assert "Mask token" not in card


def test_formats_that_cannot_hold_the_draft_are_refused(
    draft_folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = f"output_dir={tmp_path / 'hub'}"
    assert "holds DFlash drafts only" in refused(f"checkpoint={draft_folder}", REPO, "dry_run=true", out, "format=zlab")
    assert not (tmp_path / "hub").exists()
    message = refused(f"checkpoint={draft_folder}", REPO, "dry_run=true", out, "format=speculator")
    assert "Did you mean 'speculators'?" in message


def test_sharded_weights_are_published_with_their_index(goldens: Path, tmp_path: Path) -> None:
    draft = deepspec.load_draft(goldens / "ckpt_dspark_vanilla")
    draft.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    out = tmp_path / "hub"
    assert main(["push", f"checkpoint={tmp_path / 'sharded'}", REPO, "dry_run=true", f"output_dir={out}"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    loaded = deepspec.load_draft(out).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in draft.state_dict().items())


@pytest.mark.parametrize(("words", "private"), [([], True), (["private=false"], False)])
def test_push_creates_the_repository_and_sends_the_folder(
    draft_folder: Path, tmp_path: Path, hub: Callable[..., FakeHub], words: list[str], private: bool
) -> None:
    fake, out = hub(private=private), tmp_path / "hub"
    assert main(["push", f"checkpoint={draft_folder}", REPO, f"output_dir={out}", *words]) == 0
    (create, created, settings), (upload, sent, arguments) = fake.calls
    assert (create, created, settings["private"], settings["exist_ok"]) == ("create_repo", "me/my-draft", private, True)
    assert (upload, sent, arguments["folder_path"]) == ("upload_folder", "me/my-draft", out)
    assert arguments["revision"] is None
    assert (out / "model.safetensors").is_file()


def test_push_to_a_branch_of_a_repository_named_without_its_owner(
    draft_folder: Path, tmp_path: Path, hub: Callable[..., FakeHub]
) -> None:
    fake = hub()
    command = [
        "push",
        f"checkpoint={draft_folder}",
        "repo_id=my-draft",
        "revision=v2",
        f"output_dir={tmp_path / 'hub'}",
    ]
    assert main(command) == 0
    assert [(name, repo_id) for name, repo_id, _ in fake.calls] == [
        ("create_repo", "my-draft"),
        ("create_branch", "me/my-draft"),
        ("upload_folder", "me/my-draft"),
    ]
    assert fake.calls[1][2]["branch"] == fake.calls[2][2]["revision"] == "v2"


def test_a_private_push_never_goes_to_a_public_repository(
    draft_folder: Path, tmp_path: Path, hub: Callable[..., FakeHub], refused: Callable[..., str]
) -> None:
    fake = hub(private=False)
    message = refused(f"checkpoint={draft_folder}", REPO, f"output_dir={tmp_path / 'hub'}")
    assert "is public" in message
    assert "private=false" in message
    assert [name for name, *_ in fake.calls] == ["create_repo"]


def http_error(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError(f"{status} from the Hub", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        (httpx.ConnectError("Name or service not known"), "check the network"),
        (OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled"), "HF_HUB_OFFLINE"),
        (http_error(401), "hf auth login"),
        (http_error(403), "check the namespace"),
        (http_error(500), "try again later"),
    ],
)
def test_failed_uploads_say_what_to_do_and_keep_the_folder(
    draft_folder: Path,
    tmp_path: Path,
    hub: Callable[..., FakeHub],
    refused: Callable[..., str],
    failure: Exception,
    advice: str,
) -> None:
    hub(failure=failure)
    message = refused(f"checkpoint={draft_folder}", REPO, f"output_dir={tmp_path / 'hub'}")
    assert str(failure) in message
    assert advice in message
    assert f"kept in {tmp_path / 'hub'}" in message
    assert deepspec.load_draft(tmp_path / "hub").block_size == 7


def test_no_token_is_said_before_anything_is_written(
    draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(f"{UPLOAD}.get_token", lambda: None)
    message = refused(f"checkpoint={draft_folder}", REPO, f"output_dir={tmp_path / 'hub'}")
    assert "`hf auth login`" in message
    assert "HF_TOKEN" in message
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("repo_id", ["me/my/draft", "me/-draft-", "me/draft.git", "my draft"])
def test_invalid_repo_id(draft_folder: Path, refused: Callable[..., str], repo_id: str) -> None:
    assert f"repo_id={repo_id}: " in refused(f"checkpoint={draft_folder}", f"repo_id={repo_id}", "dry_run=true")


def test_missing_and_empty_checkpoints(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no such folder" in refused(f"checkpoint={tmp_path / 'nothing'}", REPO, "dry_run=true")
    assert "neither config.json nor checkpoints" in refused(f"checkpoint={tmp_path}", REPO, "dry_run=true")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(draft_folder: Path, refused: Callable[..., str], name: str) -> None:
    (draft_folder / name).write_bytes(b"\x80")
    message = refused(f"checkpoint={draft_folder}", REPO, "dry_run=true")
    assert name in message
    assert "save_pretrained" in message


def test_a_folder_without_safetensors_is_refused(draft_folder: Path, refused: Callable[..., str]) -> None:
    (draft_folder / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refused(f"checkpoint={draft_folder}", REPO, "dry_run=true")


def test_truncated_weights_are_refused(draft_folder: Path, refused: Callable[..., str]) -> None:
    weights = draft_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(f"checkpoint={draft_folder}", REPO, "dry_run=true")
    assert str(weights) in message
    assert "damaged" in message


def test_weights_that_are_not_finite_are_refused(goldens: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    draft = deepspec.load_draft(goldens / "ckpt_dflash")
    with torch.no_grad():
        draft.norm.weight[0] = torch.nan
    draft.save_pretrained(tmp_path / "broken")
    assert "norm.weight contains NaN" in refused(f"checkpoint={tmp_path / 'broken'}", REPO, "dry_run=true")


def test_a_changed_newest_checkpoint_is_refused_and_the_one_before_named(
    run_folder: Path, refused: Callable[..., str]
) -> None:
    weights = run_folder / "checkpoints" / "step-00000020" / "draft" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = refused(f"checkpoint={run_folder}", REPO, "dry_run=true")
    assert str(weights) in message
    assert f"checkpoint={run_folder / 'checkpoints' / 'step-00000010'}" in message


def test_folders_with_other_content_are_never_replaced(draft_folder: Path, refused: Callable[..., str]) -> None:
    assert "holds the checkpoint" in refused(
        f"checkpoint={draft_folder}", REPO, "dry_run=true", f"output_dir={draft_folder}"
    )
    diary = draft_folder.parent / "mine" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("mine", encoding="utf-8")
    message = refused(f"checkpoint={draft_folder}", REPO, "dry_run=true", f"output_dir={diary.parent}")
    assert "diary.txt" in message
    assert diary.read_text(encoding="utf-8") == "mine"


def test_unknown_words_and_keys(refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'repo_id'?" in refused("checkpoint=x", "repoid=me/x")
    assert "must be given" in refused("checkpoint=x")
    assert main(["pull"]) == 2
    assert "Did you mean 'push'?" in capsys.readouterr().err
