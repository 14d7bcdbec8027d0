"""The model card's commands: those of this draft, in this format, for this target; or why there is none."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from publishing_world import change_config, read_config, write_draft
from transformers import Qwen3Config

from deepspec.publishing.formats import FORMATS
from deepspec.publishing.serving import serving_section, usage_section


def section(
    kind: str, name: str, folder: Path, revision: str | None = None, *, has_calibration: bool = False, **changes: Any
) -> str:
    """The serving section of the card of a draft in a format."""
    change_config(write_draft(kind, folder), **changes)
    config = Qwen3Config.from_dict(read_config(folder))
    return serving_section(config, "me/draft", FORMATS[name], revision, has_calibration=has_calibration)


def words_of(text: str, program: str) -> list[str]:
    """The words of the command of one engine, as a shell reads them."""
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if program in block]
    return shlex.split(block)


def settings_of(text: str) -> dict[str, Any]:
    words = words_of(text, "vllm serve")
    return json.loads(words[words.index("--speculative-config") + 1])


@pytest.mark.parametrize(
    ("kind", "name", "method", "tokens"),
    [
        ("dspark_vanilla", "deepspec", "dspark", 7),
        ("dspark_vanilla", "speculators", "dspark", 7),
        ("fill_in", "zlab", "dflash", 7),
        ("fill_in", "transformers", "dflash", 7),
        ("eagle3", "speculators", "eagle3", 7),
        ("pruned_llama_eagle3", "eagle3", "eagle3", 7),
        ("pruned", "deepspec", "dspark", 7),
    ],
)
def test_vllm(kind: str, name: str, method: str, tokens: int, tmp_path: Path) -> None:
    text = section(kind, name, tmp_path / "a", target_revision=None)
    assert settings_of(text) == {
        "method": method,
        "model": "me/draft",
        "num_speculative_tokens": tokens,
        "draft_sample_method": "probabilistic",
    }
    assert words_of(text, "vllm serve")[:3] == ["vllm", "serve", "me/target"]


def test_revisions_of_target_and_draft(tmp_path: Path) -> None:
    text = section("dspark_vanilla", "sglang", tmp_path / "a", "v2")
    assert settings_of(text)["revision"] == "v2"
    assert words_of(text, "vllm serve")[2:5] == ["me/target", "--revision", "abc123"]
    words = words_of(text, "sglang.launch_server")
    assert words[words.index("--revision") + 1] == "abc123"
    assert words[words.index("--speculative-draft-model-revision") + 1] == "v2"


def test_sglang(tmp_path: Path) -> None:
    words = words_of(section("dspark_rnn", "sglang", tmp_path / "a"), "sglang.launch_server")
    assert words[words.index("--speculative-algorithm") + 1] == "DSPARK"
    assert words[words.index("--speculative-draft-model-path") + 1] == "me/draft"
    assert words[words.index("--speculative-dspark-block-size") + 1] == "7"
    words = words_of(section("fill_in", "zlab", tmp_path / "b"), "sglang.launch_server")
    assert words[words.index("--speculative-algorithm") + 1] == "DFLASH"
    assert words[words.index("--speculative-dflash-block-size") + 1] == "8", "slots, the anchor's among them"
    text = section("llama_eagle3", "eagle3", tmp_path / "c", has_calibration=True)
    words = words_of(text, "sglang.launch_server")
    flags = ("algorithm", "num-steps", "eagle-topk", "num-draft-tokens")
    assert [words[words.index(f"--speculative-{flag}") + 1] for flag in flags] == ["EAGLE3", "7", "1", "8"]
    assert "most probable tokens" in text


def test_transformers_code_is_code(tmp_path: Path) -> None:
    text = section("fill_in", "transformers", tmp_path / "a", "v2")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "AutoModel" in block]
    compile(code, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("me/target", revision="abc123")' in code
    assert 'AutoModel.from_pretrained("me/draft", revision="v2")' in code
    assert 'speculation_type="dflash"' in code


@pytest.mark.parametrize(
    ("kind", "name", "lines"),
    [
        (
            "dspark_rnn",
            "deepspec",
            [
                "- vLLM cannot, because it has only the vanilla sequential head (markov_head_type=rnn).",
                "- Transformers cannot, because it decodes with DFlash drafts only",
                "- speculators cannot, because it does not read the deepspec format: export it with format=",
            ],
        ),
        (
            "eagle3",
            "deepspec",
            ["- vLLM cannot, because it has no Qwen3Eagle3Model: export it with format=speculators."],
        ),
        (
            "llama_eagle3",
            "deepspec",
            [
                "- vLLM cannot, because it has no LlamaEagle3Model: export it with format=eagle3 or speculators.",
                "- SGLang cannot, because it has no LlamaEagle3Model: export it with format=eagle3.",
            ],
        ),
        ("eagle3", "speculators", ["- SGLang cannot, because it has no query and key norms in an Eagle3"]),
        ("dflash", "deepspec", ["- vLLM cannot, because it has DFlash only in", "- SGLang cannot, because it refuses"]),
        ("fill_in", "speculators", ["- SGLang cannot, because it does not read the speculators format"]),
        ("pruned", "deepspec", ["- SGLang cannot, because it drafts with the target's whole head"]),
    ],
)
def test_engines_that_cannot_get_one_line(kind: str, name: str, lines: list[str], tmp_path: Path) -> None:
    text = section(kind, name, tmp_path / "a")
    for line in lines:
        assert [each for each in text.splitlines() if each.startswith(line)], text


def test_what_engines_use_of_the_draft(tmp_path: Path) -> None:
    text = section("dspark_vanilla", "sglang", tmp_path / "a", has_calibration=True)
    assert '`"enable_adaptive_verification": true`' in text
    assert "The calibration is not used." in text
    assert "--speculative-dspark-confidence-sts-path dspark_sts.json" in text
    text = section("dspark_vanilla", "deepspec", tmp_path / "b", has_calibration=True)
    assert "`format=sglang` writes it so" in text
    assert "confidence" not in section("fill_in", "zlab", tmp_path / "c")


def test_targets_that_are_not_on_the_hub(tmp_path: Path) -> None:
    text = section("fill_in", "transformers", tmp_path / "a", target_model_name_or_path="builtin", target_revision=None)
    assert "TARGET=$(python -c 'from deepspec.targets import BUILTIN_WEIGHTS; print(BUILTIN_WEIGHTS)')\nvllm" in text
    assert 'vllm serve "$TARGET" \\\n' in text
    assert "AutoModelForCausalLM.from_pretrained(BUILTIN_WEIGHTS)" in text
    text = section("fill_in", "zlab", tmp_path / "b", target_model_name_or_path="/home/me/secret")
    assert "vllm serve PATH_OF_THE_TARGET" in text
    assert "secret" not in text


def test_targets_in_gguf_files(tmp_path: Path) -> None:
    text = section("dspark_vanilla", "deepspec", tmp_path / "a", target_gguf_file="m.Q4_1.gguf", target_revision=None)
    assert "- vLLM cannot, because it has no loader for the target's GGUF file m.Q4_1.gguf" in text
    words = words_of(text, "sglang.launch_server")
    assert words[words.index("--model-path") + 1] == "me/target/m.Q4_1.gguf"
    assert words[words.index("--load-format") + 1] == "gguf"


def test_deepspec_reads_its_own_layouts_and_imports_the_others(tmp_path: Path) -> None:
    config = Qwen3Config.from_dict(read_config(write_draft("fill_in", tmp_path / "a")))
    for name in ("deepspec", "zlab", "sglang"):
        assert 'deepspec.load_draft("me/draft", target=target)' in usage_section(config, "me/draft", FORMATS[name])
    text = usage_section(config, "me/draft", FORMATS["speculators"])
    assert "hf download me/draft --local-dir draft\n" in text
    assert "import path=draft output_dir=draft-deepspec target=me/target\n" in text
    assert 'deepspec.load_draft("draft-deepspec", target=target)' in text
