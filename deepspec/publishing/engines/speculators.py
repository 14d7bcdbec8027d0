"""speculators 0.9: `SpeculatorModel.from_pretrained`, to train a draft further or to compare numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deepspec.drafts.engines import DraftKind
from deepspec.publishing.convert import OpenedDraft
from deepspec.publishing.engines.base import Engine, Finding, Serving, care, check_layer_ids, check_rope, fails, fine
from deepspec.publishing.formats import DraftFolder, Format

OTHER_TYPES = ("peagle", "dflash2", "xpress", "mtp", "eagle3", "dflash", "dspark")


class Speculators(Engine):
    name, title, version = "speculators", "speculators", "0.9"
    formats = ("speculators", "zlab")

    def unread(self, kind: DraftKind, its_format: Format) -> str | None:
        if its_format.name in ("deepspec", "sglang") and kind.is_fill_in and not kind.is_pruned:
            return None  # it converts what calls itself DFlashDraftModel
        return super().unread(kind, its_format)

    def traps(self, draft: OpenedDraft) -> Iterator[Finding]:
        config = draft.folder.config
        if draft.format.name != "speculators":
            yield care("converts it on loading, which needs from_pretrained(..., verifier=TARGET)")
            return
        kind = config["speculators_model_type"]
        yield fine(
            f"speculators_model_type {kind}, written by {config.get('speculators_version', 'an unknown version')}"
        )
        verifier = ((config.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")
        if not verifier:
            yield fails("names no verifier, so embedding and head cannot be loaded; export it with target=")
        elif verifier.startswith(("/", ".", "~")) and not Path(verifier).expanduser().is_dir():
            yield fails(f"its verifier {verifier} is no folder on this machine; export it with target=")
        else:
            yield fine(f"verifier {verifier}")
        if kind == "dspark" and "sample_from_anchor" not in config:
            yield care("sample_from_anchor is missing: taken for true here and for false by vLLM; write it")
        yield from check_layer_ids(draft, lowest=-1)
        yield from check_rope(draft.config)

    def examine_unknown(self, folder: DraftFolder) -> Iterator[Finding]:
        kind = folder.config.get("speculators_model_type")
        if kind in OTHER_TYPES:
            yield fine(f"speculators_model_type {kind}")
            yield care("DeepSpec does not know this draft, so names and shapes of its tensors were not compared")
        elif any("eagle3" in name.lower() for name in folder.architectures):
            yield fails("does not read it as it is; `speculators convert` makes its own format of it")
        else:
            yield fails(f"has no draft {', '.join(folder.architectures) or '(architectures missing)'}")

    def command(self, serving: Serving) -> str:
        arguments = [f'"{serving.draft}"']
        if serving.draft_revision:
            arguments.append(f'revision="{serving.draft_revision}"')
        if serving.format.name != "speculators":
            arguments.append(f'verifier="{serving.target}"')
        return (
            "```python\nfrom speculators import SpeculatorModel\n\n"
            f"draft = SpeculatorModel.from_pretrained({', '.join(arguments)})\n```"
        )

    def features(self, serving: Serving) -> list[str]:
        return ["It does not serve; it trains a draft further, and vLLM reads what it saves."]
