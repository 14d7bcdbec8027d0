"""SGLang's own readers of draft configs and measured tables, out of its unpacked wheel.

Only the modules with those readers are loaded; what they import of the rest of SGLang, which needs a GPU, is replaced
by names without meaning.
"""

from __future__ import annotations

import ast
import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from driving import answer
from transformers import AutoConfig

SPECULATIVE = "sglang.srt.speculative"
DSPARK = f"{SPECULATIVE}.dspark_components"
PACKAGES = ("sglang", "sglang.srt", SPECULATIVE, DSPARK)
READERS = (f"{SPECULATIVE}.dflash_utils", *(f"{DSPARK}.dspark_{name}" for name in ("config", "sts", "sps")))


class Nothing(ModuleType):
    """A module in which everything is there and means nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class Stubs:
    """Finds every module of SGLang that is no reader."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        is_other = name.startswith("sglang.") and name not in READERS
        return ModuleSpec(name, self, is_package=True) if is_other else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def read(
    wheel: str, drafts: list[str], sts: str | None = None, sps: str | None = None, vocab_size: int = 0
) -> dict[str, Any]:
    """What SGLang reads from the folders of drafts, and from the two files."""
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(Path(wheel, *name.split(".")))]
        sys.modules[name] = package
    sys.meta_path.insert(0, Stubs())
    dflash, config, calibration, costs = map(importlib.import_module, READERS)
    classes = model_classes(Path(wheel, "sglang", "srt", "models"))
    found: dict[str, Any] = {"drafts": []}
    for folder in drafts:
        given = AutoConfig.from_pretrained(folder)
        is_dspark = bool(getattr(given, "markov_rank", 0))
        parsed = (config.parse_dspark_draft_config if is_dspark else dflash.parse_dflash_draft_config)(
            draft_hf_config=given
        )
        fields = ("num_hidden_layers", "num_target_layers", "target_layer_ids", "mask_token_id")
        entry = {name: getattr(parsed, name) for name in fields}
        entry["file"] = classes.get(given.architectures[0])
        if is_dspark:
            runtime = config.resolve_runtime_config(
                draft_hf_config=given, speculative_num_draft_tokens=None, target_vocab_size=vocab_size
            )
            entry |= {"gamma": runtime.gamma, "from_anchor": config.get_dspark_sample_from_anchor(given)}
            entry |= {"markov_rank": parsed.markov_rank, "markov_head_type": parsed.markov_head_type}
        else:
            entry["block_size"] = parsed.block_size
        found["drafts"].append(entry)
    if sts:
        found["temperatures"] = calibration.load_sts_calibration_from_path(sts).temperatures
    if sps:
        table = costs.load_sps_table_from_path(sps)
        found["steps_per_second"] = {tokens: table.lookup(tokens) for tokens in table.sample_batch_tokens}
    return found


def model_classes(models: Path) -> dict[str, str]:
    """The file of each architecture that SGLang has, from the `EntryClass` of its model files."""
    found = {}
    for path in models.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EntryClass":
                names = [each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)]
                found |= dict.fromkeys(names, path.name)
    return found


if __name__ == "__main__":
    answer(read)
