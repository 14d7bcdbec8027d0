"""A published instruction-tuned model from end to end:
`python -m pytest -m real -s tests/real/test_real_smollm2.py`.

In an environment of its own (environments.py: this project with its gguf extra) a draft of SmolLM2-135M-Instruct, a
Q4_1 GGUF file, is trained for 20 steps online and 20 from a cache, and evaluated. 22 minutes on two busy CPU cores.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import environments
import pytest
from engines import run

STEPS, SAMPLES_PER_STEP, HELD_OUT = 20, 4, 16

pytestmark = [pytest.mark.real, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def python() -> Path:
    return environments.project()


def first_rows(source: Path, destination: Path, count: int) -> str:
    with source.open(encoding="utf-8") as rows:
        destination.write_text("".join(islice(rows, count)), encoding="utf-8")
    return str(destination)


def last_metrics(run_folder: Path) -> dict[str, float]:
    """Of all lines of metrics.jsonl, the newest value of each figure."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def test_trains_online_and_cached_and_is_evaluated(python: Path, tmp_path: Path):
    corpus = tmp_path / "corpus"
    run(python, "-m", "data_prep.corpus", f"output_dir={corpus}")
    model = environments.SMOLLM2_FILE
    target = [f"target.path={environments.smollm2()}", f"target.gguf_file={model}"]
    target.append("target.dtype=float32")  # few CPUs multiply bfloat16
    template = f"data.chat_template={environments.ROOT / 'deepspec/targets/builtin_weights/chat_template.jinja'}"
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
    online, seconds = run(python, "train.py", *training, f"output_dir={tmp_path / 'online'}")
    report["online"] = figures(tmp_path / "online", seconds)
    assert "134.5 M parameters, float32" in online
    _, seconds = run(python, "-m", "data_prep.cache", *training, features)
    report["cache"] = {"wall_seconds": round(seconds)}
    words = ["features.source=cached", features, f"output_dir={tmp_path / 'cached'}"]
    _, seconds = run(python, "train.py", *training, *words)
    report["cached"] = figures(tmp_path / "cached", seconds)
    words = ["eval.sets=[math]", "eval.limit=4", "eval.temperatures=[1.0]", "decode.max_new_tokens=48"]
    words += [f"eval.prompts_dir={corpus / 'prompts'}"]
    words += [f"checkpoint={tmp_path / 'cached'}", f"output_dir={tmp_path / 'eval'}", template]
    _, seconds = run(python, "eval.py", *target, *words)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text(encoding="utf-8"))
    report["eval"] = {"wall_seconds": round(seconds), "results": metrics["results"]}
    print(json.dumps(report, indent=2))

    taus = [report[name]["eval/tau"] for name in ("online", "cached")]
    assert taus[0] == pytest.approx(taus[1], abs=0.02)
    assert min(taus) > 1
    assert metrics["target"]["gguf_file"] == model


def figures(run_folder: Path, seconds: float) -> dict[str, float]:
    metrics = last_metrics(run_folder)
    wanted = {name: value for name, value in metrics.items() if "tau" in name or "tokens_per_second" in name}
    return {"wall_seconds": round(seconds), "loss": metrics["loss"], **wanted}
