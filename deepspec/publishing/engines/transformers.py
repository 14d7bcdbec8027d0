"""Transformers 5.24: `generate(assistant_model=..., speculation_type="dflash")`."""

from __future__ import annotations

from collections.abc import Iterator

from deepspec.publishing.convert import OpenedDraft
from deepspec.publishing.engines.base import Engine, Finding, Serving, care, check_layer_ids, check_rope, fails, fine
from deepspec.publishing.formats import DraftFolder


class Transformers(Engine):
    name, title, version = "transformers", "Transformers", "5.24"
    formats = ("transformers",)

    def traps(self, draft: OpenedDraft) -> Iterator[Finding]:
        yield fine(f"MuseGlimmerAssistantModel, {draft.kind.draft_length} tokens a round")
        yield from check_layer_ids(draft, lowest=-1)
        yield from check_rope(draft.config)
        yield fine("embedding and head are taken from the target")
        yield care("one row at a time, and no target with a recurrent state")

    def examine_unknown(self, folder: DraftFolder) -> Iterator[Finding]:
        yield fails(f"has no way to draft with {', '.join(folder.architectures) or 'this (architectures missing)'}")

    def command(self, serving: Serving) -> str:
        pinned = f', revision="{serving.target_revision}"' if serving.target_revision else ""
        if serving.target_gguf_file:
            pinned += f', gguf_file="{serving.target_gguf_file}"'
        branch = f', revision="{serving.draft_revision}"' if serving.draft_revision else ""
        target = "BUILTIN_WEIGHTS" if serving.is_builtin else f'"{serving.target}"'
        builtin = "from deepspec.targets import BUILTIN_WEIGHTS\n" if serving.is_builtin else ""
        return (
            f"```python\n{builtin}from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({target}{pinned})\n"
            f"target = AutoModelForCausalLM.from_pretrained({target}{pinned})\n"
            f'draft = AutoModel.from_pretrained("{serving.draft}"{branch})\n'
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            'output = target.generate(**inputs, assistant_model=draft, speculation_type="dflash", max_new_tokens=200)\n'
            "print(tokenizer.decode(output[0]))\n```"
        )

    def features(self, serving: Serving) -> list[str]:
        return ["One row at a time; with `do_sample=True` the draft's tokens are sampled too."]
