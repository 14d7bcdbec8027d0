"""`push`: build the folder of a repository and upload it, or with dry_run=true only say what would be sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from deepspec.config import ConfigError
from deepspec.publishing.errors import PublishError
from deepspec.publishing.folder import CALIBRATION_FILES, build_folder
from deepspec.publishing.formats import format_named
from deepspec.publishing.results import read_evaluation
from deepspec.publishing.source import DraftSource, find_source
from deepspec.publishing.target_names import is_hub_id


@dataclass
class PushOptions:
    """Publish a draft with a model card made from its own evaluation."""

    checkpoint: str = "???"  # training run (its newest checkpoint), checkpoint or draft folder
    repo_id: str = "???"  # name on the Hub: user/name, or organization/name
    format: str = "deepspec"  # of config and weights: deepspec, speculators, zlab, sglang, eagle3 or transformers
    target: str | None = None  # Hub id that format=speculators names as the verifier; null = as the draft records it
    evaluation: str | None = None  # output_dir of eval.py for this draft; null = the card says "not evaluated"
    plot: str | None = None  # PNG shown in the card; null = tau.png of the evaluation, if any
    license: str | None = None  # license identifier for the card's metadata; null = you add it later
    private: bool = True  # create the repository private
    revision: str | None = None  # branch to push to, created if missing; null = main
    dry_run: bool = False  # write the folder and say what would be sent; needs neither network nor token
    output_dir: str | None = None  # the folder that is sent; null = outputs/hub/NAME


def push(options: PushOptions) -> Path:
    """Check everything, write the folder, upload it. Returns the folder.

    Raises:
        ConfigError: an invalid repo_id or format.
        FileNotFoundError: no such checkpoint, evaluation or plot.
        PublishError: what the message says; after the folder is written it is kept.
    """
    try:
        validate_repo_id(options.repo_id)
    except HFValidationError as error:
        raise ConfigError(f"repo_id={options.repo_id}: {error}") from error
    if not options.dry_run:
        _require_token()
    chosen = format_named(options.format)
    source = find_source(options.checkpoint)
    if chosen.names_verifier:
        _require_public_target(options, source)
    evaluation = read_evaluation(options.evaluation, source) if options.evaluation else None
    folder = Path(options.output_dir or f"outputs/hub/{options.repo_id.replace('/', '--')}")
    build_folder(
        folder,
        source,
        evaluation,
        repo_id=options.repo_id,
        its_format=chosen,
        target=options.target,
        revision=options.revision,
        license_name=options.license,
        plot=Path(options.plot) if options.plot else None,
    )
    visibility = "private" if options.private else "public"
    branch = f", branch {options.revision}" if options.revision else ""
    if options.dry_run:
        print(
            f"Dry run: nothing is sent. Without dry_run=true, model repository {options.repo_id} ({visibility}{branch})"
        )
        print(f"would be created if it does not exist, and receive these files of {folder}:")
        _print_files(folder)
        return folder
    print(f"Sending {folder} to {options.repo_id} ({visibility}{branch}):")
    _print_files(folder)
    print(f"Published: {_upload(folder, options)}")
    return folder


def _print_files(folder: Path) -> None:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    width = max(len(file.name) for file in files)
    for file in files:
        print(f"  {file.name:<{width}}  {readable_size(file.stat().st_size):>10}")
    print(f"  {'total':<{width}}  {readable_size(sum(file.stat().st_size for file in files)):>10}")


def readable_size(count: float) -> str:
    """Bytes with a binary unit, for example `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _require_public_target(options: PushOptions, source: DraftSource) -> None:
    name = options.target or getattr(source.config, "target_model_name_or_path", None)
    if not is_hub_id(name):
        raise PublishError(
            f"format={options.format} names the target for everybody, and {name or 'none that is recorded'} is not on "
            "the Hub; give its Hub id with target=, or choose another format"
        )


def _require_token() -> None:
    if not get_token():
        raise PublishError(
            "no Hugging Face token: run `hf auth login` or set HF_TOKEN to a token with write access "
            "(https://huggingface.co/settings/tokens); dry_run=true needs none"
        )


def _upload(folder: Path, options: PushOptions) -> str:
    """Create the repository if needed and send the folder in one commit. Returns the repository's address."""
    api = HfApi(library_name="deepspec")
    try:
        repository = api.create_repo(options.repo_id, repo_type="model", private=options.private, exist_ok=True)
        repo_id = repository.repo_id
        if options.private and not api.repo_info(repo_id, repo_type="model").private:
            raise PublishError(
                f"{repo_id} exists and is public, so nothing was sent; give private=false to publish there, or another "
                f"repo_id. The folder is kept in {folder}"
            )
        if options.revision:
            api.create_branch(repo_id, branch=options.revision, exist_ok=True)
        # The same commit removes what an earlier push left: an old index would hide the new weights, an old calibration
        # would be taken for theirs.
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            revision=options.revision,
            commit_message="Draft model for speculative decoding",
            delete_patterns=["*.safetensors", "*.safetensors.index.json", *CALIBRATION_FILES],
        )
    except (httpx.HTTPError, OSError, HFValidationError) as error:
        raise PublishError(_explain_failure(error, folder, options)) from error
    return str(repository)


def _explain_failure(error: Exception, folder: Path, options: PushOptions) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        advice = "the token is not valid: run `hf auth login`, or set HF_TOKEN to a new one"
    elif status == 403:
        advice = "the token may not write there: check the namespace of repo_id and that the token has write access"
    elif status is not None:
        advice = "the Hub refused it: check repo_id and revision, or try again later"
    else:
        advice = (
            "the Hub cannot be reached: check the network, the proxy, HF_ENDPOINT and that HF_HUB_OFFLINE is not set"
        )
    cause = str(error).strip().rstrip(".") or type(error).__name__
    return (
        f"could not publish to {options.repo_id}: {cause}. Most likely {advice}. "
        f"The folder is kept in {folder}; give the same command again, or send it with "
        f"`hf upload {options.repo_id} {folder}{' --private' if options.private else ''}`"
    )
