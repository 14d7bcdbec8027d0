"""features.source=vllm against a stand-in that answers as vLLM's documentation says (vllm_exchange.json), with states
that it computes from the same weights in vLLM's own way of counting layers. No vLLM takes part.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from feature_servers import QuietHandler, answering, packed, padded
from safetensors.torch import save_file
from training_world import changed, tiny_run
from transformers import AutoModelForCausalLM

from deepspec.config import ConfigError, FeaturesConfig
from deepspec.data.packing import Sample, anchor_candidates, lay_out
from deepspec.features import OnlineFeatures
from deepspec.features.replicas import FeatureServerError
from deepspec.features.vllm import connect_vllm, vllm_layer_ids
from deepspec.targets import load_target
from deepspec.training import train
from deepspec.training.log import read_metrics

pytestmark = pytest.mark.usefixtures("in_temporary_folder")
EXCHANGE = json.loads(Path(__file__).with_name("vllm_exchange.json").read_text(encoding="utf-8"))
LAYERS = [0, 2]
CPU = torch.device("cpu")


class StandIn:
    """Answers like `vllm serve` with extract_hidden_states; the attributes make it misbehave."""

    def __init__(self, model_folder: Path, storage: Path, layer_ids=(1, 3, 4)):
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        self.storage = storage
        self.layer_ids = layer_ids  # vLLM's: 0 = embedding output, i = output of layer i - 1, last = before the norm
        self.models = copy.deepcopy(EXCHANGE["models"]["response"])
        self.requests: list[dict] = []
        self.locked_seconds: float | None = None  # None = an old version, which writes before it answers
        self.change_states = lambda states: states
        self.change_answer = lambda answer: answer
        self.one_at_a_time = threading.Lock()

    @torch.no_grad()
    def states(self, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, layers, hidden] and log-probabilities of the next token, [vocab]."""
        last = []
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        output = self.model(torch.tensor([prompt]), output_hidden_states=True)
        hook.remove()
        numbered = [*output.hidden_states[:-1], last[0]]
        return torch.stack([numbered[i][0] for i in self.layer_ids], dim=1), output.logits[0, -1].log_softmax(-1)

    def complete(self, request: dict) -> dict:
        with self.one_at_a_time:
            self.requests.append(request)
            states, logprobs = self.states(request["prompt"])
            path = self.storage / f"cmpl-{len(self.requests)}.safetensors"
        tensors = {
            "hidden_states": self.change_states(states).contiguous(),
            "token_ids": torch.tensor(request["prompt"]),
        }
        if self.locked_seconds is None:
            save_file(tensors, path)
        else:
            self.write_later(tensors, path)
        answer = copy.deepcopy(EXCHANGE["completion"]["response"])
        answer["choices"][0]["logprobs"] = self.logprobs(logprobs, request.get("logprobs"))
        answer["kv_transfer_params"] = {"hidden_states_path": str(path)}
        return self.change_answer(answer)

    @staticmethod
    def logprobs(logprobs: torch.Tensor, wanted: int | None) -> dict | None:
        if wanted is None:
            return None
        values, tokens = logprobs.topk(wanted)
        likeliest = {f"token_id:{token}": value for value, token in zip(values.tolist(), tokens.tolist(), strict=True)}
        first = next(iter(likeliest))
        return EXCHANGE["completion"]["logprobs_of_the_probe"] | {
            "token_logprobs": [likeliest[first]],
            "tokens": [first],
            "top_logprobs": [likeliest],
        }

    def write_later(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        """As newer versions do: the lock is held when the answer goes out, and let go when the file is whole."""
        lock = open(f"{path}.lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write():
            time.sleep(self.locked_seconds)
            save_file(tensors, path)
            lock.close()

        threading.Thread(target=write).start()


@contextmanager
def listening(stand_in: StandIn):
    class Handler(QuietHandler):
        def do_GET(self):
            self.answer(200, stand_in.models) if self.path == "/v1/models" else self.answer(404, {})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            longest = stand_in.models["data"][0]["max_model_len"]
            if self.path != "/v1/completions" or len(request["prompt"]) >= longest:
                self.answer(EXCHANGE["error"]["status"], EXCHANGE["error"]["response"])
            else:
                self.answer(200, stand_in.complete(request))

        def answer(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with answering(Handler) as url:
        yield url


@pytest.fixture(scope="module")
def target(training_world):
    return load_target(str(training_world / "target"))


@pytest.fixture
def vllm(training_world, tmp_path):
    return StandIn(training_world / "target", tmp_path)


@pytest.fixture
def connect(target):
    def make(*urls, max_length=64, **features):
        config = FeaturesConfig(source="vllm", urls=list(urls), **({"timeout": 5.0, "retry_for": 5.0} | features))
        return connect_vllm(config, target, LAYERS, device=CPU, max_length=max_length)

    return make


def assert_same(found, target, batch):
    """Each document against the online features of it alone, which is how vLLM is asked; zero elsewhere."""
    wanted, tokens = anchor_candidates(batch.loss_mask, batch.position_ids), torch.zeros_like(batch.loss_mask)
    source = OnlineFeatures(target, LAYERS)
    for document in batch.documents:
        place = (document.row, document.columns)
        tokens[place] = True
        ids, mask = batch.input_ids[place].tolist(), batch.loss_mask[place].tolist()
        alone = source.batch_features(lay_out([[Sample(0, 0, "", ids, mask)]], pad_id=0))
        torch.testing.assert_close(found.context[place], alone.context[0], rtol=1e-5, atol=1e-5)
        here = wanted[place]
        torch.testing.assert_close(found.final[place][here], alone.final[0][here], rtol=1e-5, atol=1e-5)
    assert not found.context[~tokens].any()
    assert not found.final[~wanted].any()


def test_layers_are_counted_as_vllm_does():
    assert vllm_layer_ids([-1, 1, 33], 36) == [0, 2, 34, 36]


@pytest.mark.parametrize("locked_seconds", [None, 0.2], ids=["written before the answer", "written later"])
@pytest.mark.parametrize("batch", [packed([12, 1, 30]), padded([7, 25])], ids=["packed", "padded"])
def test_features_are_those_of_the_online_source(vllm, target, connect, batch, locked_seconds, tmp_path):
    vllm.locked_seconds = locked_seconds
    with listening(vllm) as url:
        assert_same(connect(url).batch_features(batch), target, batch)
    assert not list(tmp_path.iterdir()), "files and locks are gone"


def test_the_request_is_the_documented_one(vllm, connect):
    with listening(vllm) as url:
        connect(url).batch_features(packed([4]))
    recorded = EXCHANGE["completion"]["request"]
    probe, request = [request | {"prompt": "PROMPT"} for request in vllm.requests]
    assert request == recorded["body"]
    assert probe == recorded["body"] | recorded["body_of_the_probe"]


def test_two_servers_share_the_documents(vllm, training_world, target, connect, tmp_path):
    other = StandIn(training_world / "target", tmp_path / "other")
    other.storage.mkdir()
    batch = packed([5, 6, 7, 8, 9, 10])
    with listening(vllm) as url, listening(other) as other_url:
        assert_same(connect(url, other_url).batch_features(batch), target, batch)
    assert len(vllm.requests) + len(other.requests) == 8
    assert len(vllm.requests) > 1
    assert len(other.requests) > 1


def test_training_on_it(vllm, training_world, tmp_path):
    config = tiny_run(training_world, tmp_path / "online", steps=3, draft={"target_layer_ids": LAYERS})
    train(config)
    with listening(vllm) as url:
        features = {"source": "vllm", "urls": [url], "lookahead": 1}
        train(changed(dataclasses.replace(config, output_dir=str(tmp_path / "vllm")), features=features))
    found, wanted = read_metrics(tmp_path / "vllm"), read_metrics(tmp_path / "online")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], rel=1e-5)


def without(answer, *keys):
    *outer, last = keys
    inner = answer
    for key in outer:
        inner = inner[key]
    del inner[last]
    return answer


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        (
            lambda vllm: setattr(vllm, "layer_ids", (1, 3)),
            r"gives states of \[16, 2, 32\] torch.float32, expected \[16, 3, 32\] torch.float32: start vLLM with "
            r"eagle_aux_hidden_state_layer_ids=\[1, 3, 4\] and --dtype float32",
        ),
        (lambda vllm: setattr(vllm, "change_states", lambda states: states.bfloat16()), "torch.bfloat16, expected"),
        (
            lambda vllm: setattr(vllm, "layer_ids", (1, 2, 3)),
            r"gives tokens after a probe log-probabilities that differ by up to \d+\.\d\d from those of target.path=.*"
            r"another model, or vLLM extracts other layers than \[1, 3, 4\]",
        ),
        (
            lambda vllm: setattr(vllm, "change_answer", lambda answer: without(answer, "kv_transfer_params")),
            "answers without kv_transfer_params.hidden_states_path: start vLLM with the extract_hidden",
        ),
        (
            lambda vllm: setattr(vllm, "change_answer", lambda answer: without(answer, "choices", 0, "logprobs")),
            r"answers without choices\[0\].logprobs.top_logprobs",
        ),
        (
            lambda vllm: vllm.models["data"][0].update(max_model_len=64),
            "takes 64 tokens with the one that it adds, but data.max_length=64: start vLLM with --max-model-len 65",
        ),
        (lambda vllm: vllm.models.update(data=[]), "lists no model; is this vLLM"),
    ],
)
def test_servers_started_otherwise(vllm, connect, misbehave, message):
    misbehave(vllm)
    with listening(vllm) as url, pytest.raises(ConfigError, match=message):
        connect(url)


def test_another_model(vllm, connect):
    with torch.no_grad():
        torch.manual_seed(3)
        for parameter in vllm.model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    with listening(vllm) as url, pytest.raises(ConfigError, match="Qwen/Qwen3-8B is another model"):
        connect(url)


def test_names_that_differ(vllm, training_world, connect, tmp_path):
    other = StandIn(training_world / "target", tmp_path)
    other.models["data"][0]["id"] = "other"
    with (
        listening(vllm) as url,
        listening(other) as other_url,
        pytest.raises(ConfigError, match=f"{other_url} serves 'other', the server before it 'Qwen/Qwen3-8B'"),
    ):
        connect(url, other_url)


def test_states_of_a_part_of_the_tokens(vllm, connect):
    """What prefix caching did in 0.22."""
    vllm.change_states = lambda states: states[4:]
    message = "12 states for 16 tokens: start vLLM with --no-enable-prefix-caching"
    with listening(vllm) as url, pytest.raises(FeatureServerError, match=message):
        connect(url, retry_for=0.3)


def test_no_shared_file_system(vllm, connect):
    vllm.change_answer = lambda answer: answer | {"kv_transfer_params": {"hidden_states_path": "/elsewhere/1"}}
    with listening(vllm) as url, pytest.raises(FeatureServerError, match="no file /elsewhere/1: it must be on"):
        connect(url, retry_for=0.3)


def test_lock_that_is_never_let_go(vllm, connect):
    vllm.locked_seconds = 3.0
    message = r"lock was held for 0.2 s \(features.timeout\)"
    with listening(vllm) as url, pytest.raises(FeatureServerError, match=message):
        connect(url, retry_for=0.3, timeout=0.2)


def test_closing_ends_the_wait_for_a_lock(vllm, connect):
    with listening(vllm) as url, ThreadPoolExecutor(1) as pool:
        source = connect(url, timeout=20.0)
        vllm.locked_seconds = 3.0
        future = pool.submit(source.batch_features, packed([5]))
        time.sleep(0.3)
        source.close()
        with pytest.raises(FeatureServerError, match="closed"):
            future.result(timeout=1)


def test_document_that_is_too_long(vllm, connect):
    with listening(vllm) as url:
        source = connect(url)
        vllm.models["data"][0]["max_model_len"] = 30
        with pytest.raises(ConfigError, match=r"answered 400: This model's maximum context length is 4097 tokens"):
            source.batch_features(packed([40]))


def test_many_batches_at_once(vllm, target, connect):
    batches = [packed([length, 5]) for length in range(6, 12)]
    with listening(vllm) as url, ThreadPoolExecutor(2) as pool:
        source = connect(url)
        for batch, found in zip(batches, pool.map(source.batch_features, batches), strict=True):
            assert_same(found, target, batch)
        source.close()
