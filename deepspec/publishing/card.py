"""The model card: what the draft is, what was measured, how to use it. Every number comes from a file of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from deepspec.decoding.calibration import CALIBRATION_FILE
from deepspec.drafts.configuration import DraftSettings, architecture_of
from deepspec.drafts.eagle3_configuration import EAGLE3
from deepspec.evaluation.markdown import markdown_table
from deepspec.evaluation.statistics import Estimate
from deepspec.evaluation.summary import show_estimate, show_number
from deepspec.publishing.formats import Format
from deepspec.publishing.formats.base import EMBEDDING_AND_HEAD
from deepspec.publishing.results import Evaluation
from deepspec.publishing.serving import serving_section, usage_section
from deepspec.publishing.source import DraftSource
from deepspec.publishing.target_names import is_hub_id, target_title

PLOT_NAME = "tau.png"
TITLES = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle3"}
PAPERS = {
    "dspark": "[DSpark](https://arxiv.org/abs/2607.05147)",
    "dflash": "[DFlash](https://arxiv.org/abs/2602.06036)",
    "eagle3": "[EAGLE-3](https://arxiv.org/abs/2503.01840)",
}
# What the card shows of a run's config.yaml, with its title.
TRAINING_ROWS = {
    "train.steps": "Optimizer steps asked for",
    "train.epochs": "Epochs",
    "train.global_batch_size": "Samples per step",
    "train.num_anchors": "Anchors per sample, at most",
    "train.lr": "Peak learning rate",
    "train.weight_decay": "Weight decay",
    "train.warmup_ratio": "Warmup, fraction of the steps",
    "train.grad_clip": "Gradient norm clipped at",
    "train.mixed_precision": "Mixed precision",
    "train.loss.ce": "Weight of cross-entropy",
    "train.loss.tv": "Weight of total variation",
    "train.loss.confidence": "Weight of the confidence loss",
    "train.loss.decay": "Slot weight decay g in exp(-(k-1)/g)",
    "train.loss.step_decay": "Factor of the loss from one step of the chain to the next",
    "train.loss.divisor": "What the loss is divided by",
    "data.train_files": "Training data",
    "data.max_length": "Longest sample, tokens",
    "data.min_supervised_tokens": "Fewest supervised tokens of a sample",
    "seed": "Seed",
}


def build_card(
    source: DraftSource,
    evaluation: Evaluation | None,
    *,
    repo_id: str,
    its_format: Format,
    revision: str | None = None,
    license_name: str | None = None,
    with_plot: bool = False,
) -> str:
    """The text of README.md, with its YAML metadata.

    Args:
        its_format: in which the weights lie beside the card.
        revision: branch that is pushed to; None = main.
        evaluation: None = the card says that the draft has not been evaluated.
        license_name: license identifier; None = left out of the metadata.
        with_plot: show the picture that lies beside the card as `tau.png`.
    """
    settings = DraftSettings.of(source.config)
    target = getattr(source.config, "target_model_name_or_path", None)
    metadata = ModelCardData(
        base_model=target if is_hub_id(target) else None,
        library_name="deepspec",
        license=license_name,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", settings.algorithm],
    )
    sections = [
        _introduction(source, settings, repo_id),
        _results(evaluation, with_plot),
        usage_section(source.config, repo_id, its_format),
        serving_section(source.config, repo_id, its_format, revision, has_calibration=CALIBRATION_FILE in source.files),
        _architecture(source, settings, its_format),
        _training(source),
        _samples(evaluation),
        _license(license_name),
    ]
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"))


def _introduction(source: DraftSource, settings: DraftSettings, repo_id: str) -> str:
    config = source.config
    title = TITLES[settings.algorithm]
    article = "An" if title[0] in "AEIOU" else "A"
    target = getattr(config, "target_model_name_or_path", None)
    fingerprint = getattr(config, "target_fingerprint", None)
    facts = [
        ("Target", target_title(target)),
        (
            "Target revision",
            f"`{config.target_revision}`" if getattr(config, "target_revision", None) else "not pinned",
        ),
        ("Target fingerprint", f"`{fingerprint}`" if fingerprint else "not recorded"),
        ("Algorithm", PAPERS[settings.algorithm]),
        ("Trained parameters", f"{source.parameters:,}"),
    ]
    return (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"{article} {title} draft model for speculative decoding with {target_title(target)}. It proposes up to "
        f"{settings.draft_length} tokens a round, and the target verifies them in one forward pass; the text has the "
        "target's own distribution. It is of no use without that target.\n\n" + markdown_table(("", ""), facts)
    )


def _results(evaluation: Evaluation | None, with_plot: bool) -> str:
    plot = f"![Accepted length by prompt set]({PLOT_NAME})" if with_plot else ""
    if evaluation is None:
        nothing = "**This draft has not been evaluated.** No accepted length or speed-up is claimed."
        return "\n\n".join(part for part in ("## Results", nothing, plot) if part)
    rows = [
        (
            f"{row.temperature:g}",
            row.set_name,
            "" if row.prompts is None else str(row.prompts),
            _known(row.tau),
            "" if row.verify_rate is None else f"{row.verify_rate:.2f}",
            _known(row.speedup),
            ", ".join(show_number(rate) for rate in row.cond_accept),
        )
        for row in evaluation.rows
    ]
    header = ("Temperature", "Set", "Prompts", "tau", "Verify rate", "Speed-up", "cond_accept@1, 2, ...")
    empty = [i for i in range(len(header)) if not any(row[i] for row in rows)]
    table = markdown_table(
        [title for i, title in enumerate(header) if i not in empty],
        [[cell for i, cell in enumerate(row) if i not in empty] for row in rows],
    )
    legend = (
        "tau: tokens emitted per verification round, the target's own included. Verify rate: accepted + 1 over "
        "proposed + 1, summed over rounds. Speed-up: over plain decoding in the same engine on the same machine. "
        "cond_accept@k: how often token k is accepted when those before it were. "
        "In parentheses: 95% bootstrap intervals over prompts."
    )
    conditions = "; ".join(f"{title}: {value}" for title, value in evaluation.conditions)
    return "\n\n".join(part for part in ("## Results", table, legend, conditions and f"{conditions}.", plot) if part)


def _architecture(source: DraftSource, settings: DraftSettings, its_format: Format) -> str:
    config = source.config
    with_markov = " (reads the Markov embedding too)" if settings.confidence_head_with_markov else ""
    markov = f"{settings.markov_head_type}, rank {settings.markov_rank}" if settings.markov_rank else "none"
    facts = [
        ("Class", f"`{architecture_of(config)}`"),
        ("Draft layers", str(config.num_hidden_layers)),
        ("Tokens drafted a round", str(settings.draft_length)),
        ("Captured target layers", f"{list(settings.target_layer_ids)} of {settings.num_target_layers} (0-based)"),
        ("Hidden size, vocabulary", f"{config.hidden_size}, {config.vocab_size}"),
        ("Tokens it can propose", f"{settings.draft_vocab_size or 'all'}"),
        ("Heads, key/value heads", f"{config.num_attention_heads}, {config.num_key_value_heads}"),
    ]
    if settings.algorithm != EAGLE3:
        facts += [
            ("Block size", str(settings.block_size)),
            ("Markov head", markov),
            ("Confidence head", f"yes{with_markov}" if settings.confidence_head else "none"),
            ("Context window", f"{settings.context_window} tokens" if settings.context_window else "whole context"),
            ("Mask token id", str(settings.mask_token_id)),
        ]
    note = f"The embedding and the output head are the target's own, frozen, and {_stored(its_format)}."
    return f"## Architecture\n\n{markdown_table(('', ''), facts)}\n\n{note}"


def _stored(its_format: Format) -> str:
    if not its_format.left_out:
        return "stored so that the draft loads by itself"
    return "left out here" if its_format.left_out == EMBEDDING_AND_HEAD else "the embedding is left out here"


def _training(source: DraftSource) -> str:
    rows = [] if source.step is None else [("Optimizer steps done", f"{source.step:,}")]
    for key, title in TRAINING_ROWS.items():
        value = _setting(source.training, key)
        if value is None or (key == "train.epochs" and _setting(source.training, "train.steps")):
            continue
        if isinstance(value, list):
            value = ", ".join(f"`{Path(str(item)).name}`" for item in value)
        rows.append((title, str(value)))
    if not rows:
        return "## Training\n\nNo training settings lie beside this checkpoint."
    return f"## Training\n\n{markdown_table(('', ''), rows)}"


def _setting(settings: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _samples(evaluation: Evaluation | None) -> str:
    if evaluation is None or not evaluation.samples:
        return ""
    parts = ["## Sample output"]
    for sample in evaluation.samples:
        parts.append(f"Set {sample.set_name}, temperature {sample.temperature:g}. Prompt:\n\n{_fenced(sample.prompt)}")
        parts.append(f"Output:\n\n{_fenced(sample.text)}")
    return "\n\n".join(parts)


def _license(license_name: str | None) -> str:
    chosen = f"The draft: {license_name}." if license_name else "The publisher has not named a license for the draft."
    return f"## License\n\n{chosen} Its embedding and output head are the target's weights, under the target's license."


def _known(estimate: Estimate) -> str:
    return "" if estimate.value is None else show_estimate(estimate)


def _fenced(text: str, longest: int = 600) -> str:
    """A code block that no backtick of the text can close."""
    text = text if len(text) <= longest else text[:longest].rstrip() + " ..."
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
