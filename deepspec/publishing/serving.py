"""The sections of a model card that say how to use a draft: in DeepSpec, and in every engine that can serve it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from deepspec.drafts.engines import DraftKind
from deepspec.publishing.convert import BUILTIN
from deepspec.publishing.engines import ENGINES, Serving
from deepspec.publishing.formats import Format
from deepspec.publishing.target_names import is_hub_id

UNKNOWN_TARGET = "PATH_OF_THE_TARGET"
LOADED_BY_US = ("deepspec", "sglang", "zlab")


def usage_section(config: PreTrainedConfig, repo_id: str, its_format: Format) -> str:
    """How to load and measure the draft with DeepSpec."""
    path, revision = _target_path(config), getattr(config, "target_revision", None)
    gguf_file = getattr(config, "target_gguf_file", None)
    pinned_argument = f', revision="{revision}"' if revision else ""
    pinned_override = f" target.revision={revision}" if revision else ""
    if gguf_file:
        pinned_argument += f', gguf_file="{gguf_file}"'
        pinned_override += f" target.gguf_file={gguf_file}"
    checked = ""
    if getattr(config, "target_fingerprint", None):
        checked = "  # refuses a target that it was not trained for"
    before, draft = "", repo_id
    if its_format.name not in LOADED_BY_US:
        name, draft = repo_id.split("/")[-1], f"{repo_id.split('/')[-1]}-deepspec"
        before = (
            f"```bash\nhf download {repo_id} --local-dir {name}\n"
            f"python -m deepspec.publishing import path={name} output_dir={draft} target={path}\n```\n\n"
        )
    return (
        f"## Use\n\n{before}```python\nimport deepspec\nfrom deepspec.targets import load_target\n\n"
        f'target = load_target("{path}"{pinned_argument})\n'
        f'draft = deepspec.load_draft("{draft}", target=target){checked}\n'
        "```\n\nMeasure it on your own prompts:\n\n```bash\n"
        f"accelerate launch eval.py checkpoint={draft} target.path={path}{pinned_override}\n```"
    )


def serving_section(
    config: PreTrainedConfig, repo_id: str, its_format: Format, revision: str | None = None, *, has_calibration: bool
) -> str:
    """The exact command of every engine, or why it cannot.

    Args:
        revision: branch of the draft's repository; None = main.
        has_calibration: whether a calibration lies beside the weights.
    """
    serving = Serving(
        kind=DraftKind.of(config),
        format=its_format,
        draft=repo_id,
        target=_target_path(config),
        draft_revision=revision,
        target_revision=getattr(config, "target_revision", None),
        target_gguf_file=getattr(config, "target_gguf_file", None),
        has_calibration=has_calibration,
    )
    parts = [f"## Serve\n\nThe weights are in the {its_format.name} format ({its_format.description})."]
    cannot = []
    for engine in ENGINES.values():
        obstacles = engine.obstacles(serving.kind, its_format)
        if why := engine.no_target(serving):
            obstacles.append(why)
        if obstacles:
            cannot.append(f"- {engine.title} cannot, because it {'; and it '.join(obstacles)}.")
        else:
            sentences = " ".join(engine.features(serving))
            parts.append(f"**{engine.title}** ({engine.version}):\n\n{engine.command(serving)}\n\n{sentences}".rstrip())
    if cannot:
        parts.append("\n".join(cannot))
    return "\n\n".join(parts)


def _target_path(config: PreTrainedConfig) -> str:
    """The target as a command names it, without the folders of the machine that trained the draft."""
    target: str | None = getattr(config, "target_model_name_or_path", None)
    return target if target is not None and (target == BUILTIN or is_hub_id(target)) else UNKNOWN_TARGET
