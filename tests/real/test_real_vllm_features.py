"""features.source=vllm against vLLM itself: `python -m pytest -m real -s tests/real/test_real_vllm_features.py`.

The features are the online ones, and twenty steps of training on them give the same losses. The CPU build cannot write
features as it is released; drivers/vllm_unpinned.py says why and what is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import environments
import pytest
import torch
from engines import HERE, run, vllm_server
from trained_drafts import data_words
from worlds import BUILTIN, texts

from deepspec.config import FeaturesConfig
from deepspec.data.packing import Sample, lay_out
from deepspec.features import OnlineFeatures
from deepspec.features.vllm import connect_vllm, vllm_layer_ids
from deepspec.targets import load_target
from deepspec.training.log import read_metrics

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]
LAYERS = {"builtin": [1, 3, 4], "smollm2": [1, 14, 27]}
LENGTH = 256
STEPS = 20


def place_of(name: str) -> Path:
    return BUILTIN if name == "builtin" else environments.smollm2_weights()


@contextmanager
def extracting(target: Path, layer_ids: list[int], num_layers: int, folder: Path) -> Iterator[str]:
    """The URL of a server started as docs/features_served.md says, but for the connector."""
    states = folder / "states"
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {
            "hf_config": {"eagle_aux_hidden_state_layer_ids": vllm_layer_ids(layer_ids, num_layers)}
        },
    }
    transfer = {
        "kv_connector": "UnpinnedHiddenStatesConnector",
        "kv_connector_module_path": "vllm_unpinned",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(states)},
    }
    words = ["--max-model-len", str(LENGTH + 1), "--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    words += ["--max-num-batched-tokens", "2048"]
    words += ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]
    with vllm_server(target, folder / "vllm.log", *words) as url:
        yield url


@pytest.mark.parametrize("name", ["builtin", "smollm2"])
def test_features_are_the_online_ones(name: str, tmp_path: Path):
    place = place_of(name)
    target = load_target(str(place), dtype=torch.float32)
    rows = [ids[:length] for ids, length in zip(texts(place), (200, 77, 1), strict=True)]
    batch = lay_out([[Sample(i, 0, str(i), ids, [1] * len(ids))] for i, ids in enumerate(rows)], pad_id=0)
    online = OnlineFeatures(target, LAYERS[name]).batch_features(batch)
    with extracting(place, LAYERS[name], target.num_layers, tmp_path) as url:
        config = FeaturesConfig(source="vllm", urls=[url], retry_for=20)
        source = connect_vllm(config, target, LAYERS[name], device=torch.device("cpu"), max_length=LENGTH)
        served = source.batch_features(batch)
        source.close()
    for document in batch.documents:
        here = (document.row, document.columns)
        for what in ("context", "final"):
            found, wanted = getattr(served, what)[here], getattr(online, what)[here]
            if what == "final":  # zero where no block can start
                found, wanted = found[found.any(-1)], wanted[found.any(-1)]
            difference = (found - wanted).abs().max().item() if len(found) else 0.0
            largest = wanted.abs().max().item() if len(found) else 0.0
            print(
                f"{name}, {document.length} tokens, {what}: largest {largest:.1f}, largest difference {difference:.1e}"
            )
            assert difference <= 1e-4 * max(1.0, largest)


def test_twenty_steps_of_training(tmp_path: Path):
    common = [
        "recipes=smoke",
        *data_words(),
        f"train.steps={STEPS}",
        "target.dtype=float32",
        f"data.max_length={LENGTH}",
    ]
    common += [f"train.eval_steps={STEPS}", f"train.save_steps={STEPS}", "logging.log_steps=1"]
    run(HERE, "train.py", *common, f"output_dir={tmp_path / 'online'}")
    with extracting(BUILTIN, LAYERS["builtin"], 6, tmp_path) as url:
        served = ["features.source=vllm", f"features.urls=[{url}]", "features.lookahead=2", "features.retry_for=20"]
        run(HERE, "train.py", *common, *served, f"output_dir={tmp_path / 'vllm'}")
    losses = {
        name: [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("online", "vllm")
    }
    print({name: (values[0], values[-1]) for name, values in losses.items()})
    assert len(losses["vllm"]) == STEPS
    assert losses["vllm"] == pytest.approx(losses["online"], rel=1e-3)
