"""What the number format of a feature cache costs: bytes, and accepted length of a draft trained from it.

    python -m benchmarks.cache_dtypes seeds=3 steps=150

Needs the built-in corpus (`python -m data_prep.corpus`). Writes a cache in every format of as many samples as the steps
take, trains the smoke recipe from each and from online features with the same seeds, and measures the expected accepted
length (tau) of every draft on the held-out corpus with exact features, so that only training saw the stored ones. Same
seed, same data, same anchors: the difference to online is of pairs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.summary import spread, summary, write_record
from deepspec.arguments import run_command
from deepspec.checkpoints import newest_checkpoint
from deepspec.config import FeaturesConfig, TrainRun
from deepspec.features.cache_storage import STORAGES
from deepspec.files import write_atomically
from deepspec.training.devices import start_accelerator
from deepspec.training.interrupt import StopRequest
from deepspec.training.resume import Start
from deepspec.training.setup import prepare_materials
from deepspec.training.trainer import Trainer

ONLINE = "online"
CORPUS = Path("outputs/corpus/train.jsonl")
SAMPLES_PER_STEP = 8  # of the smoke recipe


@dataclass
class CacheDtypesOptions:
    """Tau after training from each storage dtype, against online features."""

    seeds: int = 3
    steps: int = 150
    folder: str = "outputs/cache_dtypes"  # caches and runs; what is there already is used again
    output: str = "outputs/cache_dtypes.json"


def command(*words: str) -> None:
    """Raises RuntimeError with what a failed command printed."""
    finished = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"python {' '.join(words)} failed:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")


def training_data(options: CacheDtypesOptions) -> str:
    """Writes samples from the whole length of the corpus; returns them as an override."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines(keepends=True)
    wanted = min(options.steps * SAMPLES_PER_STEP, len(lines))
    file = Path(options.folder) / "train.jsonl"
    write_atomically(file, "".join(lines[i * len(lines) // wanted] for i in range(wanted)))
    return f"data.train_files=[{file}]"


def train(options: CacheDtypesOptions, data: str, way: str, seed: int) -> Path:
    """The finished run's folder."""
    output = Path(options.folder) / f"{way}_{seed}"
    words = ["recipes=smoke", data, f"seed={seed}", f"train.steps={options.steps}", f"train.eval_steps={options.steps}"]
    if way != ONLINE:
        words += ["features.source=cached", f"features.cache_dir={cache_folder(options, way)}"]
    command("train.py", *words, f"output_dir={output}")
    return output


def cache_folder(options: CacheDtypesOptions, dtype: str) -> Path:
    return Path(options.folder) / f"features_{dtype}"


def write_cache(options: CacheDtypesOptions, data: str, dtype: str) -> int:
    """Its bytes on disk."""
    folder = cache_folder(options, dtype)
    words = ["recipes=smoke", data, f"features.cache_dir={folder}", f"features.cache_dtype={dtype}"]
    command("-m", "data_prep.cache", *words)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def tau_with_exact_features(output: Path) -> float:
    """Of a run's last checkpoint on data.eval_files, with the anchors that evaluation always has."""
    stored = OmegaConf.merge(OmegaConf.structured(TrainRun), OmegaConf.load(output / "config.yaml"))
    run = replace(cast(TrainRun, OmegaConf.to_object(stored)), features=FeaturesConfig())
    checkpoint = newest_checkpoint(output)
    assert checkpoint is not None, output
    accelerator = start_accelerator(run)
    materials = prepare_materials(run, accelerator, checkpoint)
    return Trainer(run, accelerator, materials, Start(checkpoint, 0, finished=False), StopRequest()).evaluate()["tau"]


def compare(taus: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Per way: tau over seeds, its difference to online seed by seed, bytes."""
    results: dict[str, dict[str, Any]] = {}
    for way, values in taus.items():
        differences = [value - online for value, online in zip(values, taus[ONLINE], strict=True)]
        results[way] = {
            "tau": summary(values),
            "difference": summary(differences) | {"mean": statistics.mean(differences), "of_seeds": differences},
            "bytes": sizes.get(way),
        }
    return results


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("features", "cache, MB", "tau", "difference to online")
    for way, result in results.items():
        size = "-" if result["bytes"] is None else f"{result['bytes'] / 1e6:,.0f}"
        table.add_row(way, size, spread(result["tau"], 3), spread(result["difference"], 4))
    return table


def main(options: CacheDtypesOptions) -> None:
    data = training_data(options)
    sizes = {dtype: write_cache(options, data, dtype) for dtype in STORAGES}
    taus: dict[str, list[float]] = {way: [] for way in (ONLINE, *STORAGES)}
    for seed in range(options.seeds):
        for way, values in taus.items():
            values.append(tau_with_exact_features(train(options, data, way, seed)))
            print(json.dumps({"seed": seed, "features": way, "tau": values[-1]}), flush=True)
    results = compare(taus, sizes)
    Console().print(table_of(results))
    write_record(options.output, results, options)


if __name__ == "__main__":
    run_command(main, CacheDtypesOptions)
