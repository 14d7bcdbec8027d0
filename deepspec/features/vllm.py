"""features.source=vllm: a vLLM server computes the features and leaves them in files that it shares with the trainer.

vLLM (0.18 and later) has a pseudo speculative method, `extract_hidden_states`, whose connector writes the hidden states
of each prompt into a safetensors file and answers the request with its path
(https://docs.vllm.ai/en/latest/features/speculative_decoding/extract_hidden_states/). docs/features_served.md has the
command that starts such a server, and the limits.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from deepspec.config import ConfigError, FeaturesConfig
from deepspec.data.packing import TokenBatch
from deepspec.features.replicas import Replica, Replicas, Unavailable
from deepspec.features.served import LentTarget, Share, put_together, shares_of
from deepspec.features.wire import FeatureAnswer
from deepspec.targets import TargetFeatures

POLL = 0.002  # seconds between two looks at a lock
REQUESTS_UNDER_WAY = 32  # on each server: it batches them itself
PROBE = range(1, 17)  # token ids
PROBE_TOKENS = 5  # likeliest next tokens whose log-probabilities are compared
PROBE_TOLERANCE = 0.3  # nats: bfloat16 logits of 16 to 32 are rounded to 0.125


def connect_vllm(
    features: FeaturesConfig, target: LentTarget, layer_ids: Sequence[int], *, device: torch.device, max_length: int
) -> VllmFeatures:
    """The source of the vLLM servers of `features.urls`, once each has answered a probe with this target's states.

    Args:
        target: what it is, its final norm, and its head for the probe; only the norm is kept.
        device: where the features are wanted.
        max_length: tokens of the longest document.

    Raises:
        ConfigError: a server with other layers, another dtype, too short a context or, as far as one can see, another
            target.
        FeatureServerError: a server does not answer.
    """
    replicas = Replicas(features.urls, timeout=features.timeout, retry_for=features.retry_for)
    source = VllmFeatures(replicas, target, layer_ids, device=device, timeout=features.timeout)
    for replica in replicas.replicas:
        source.check(replica, target, max_length)
    return source


def vllm_layer_ids(layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """What vLLM has to be started with: it counts layer inputs, so its layer i + 1 is the output of our layer i; the
    last one is the state before the final norm."""
    return [*(layer_id + 1 for layer_id in layer_ids), num_layers]


class VllmFeatures:
    """One completion request of one token for each document; vLLM batches them."""

    concurrency = 2  # one batch is computed while another is read
    flops_per_token = 0.0
    is_remote = True

    def __init__(
        self, replicas: Replicas, target: LentTarget, layer_ids: Sequence[int], *, device: torch.device, timeout: float
    ):
        self._replicas = replicas
        self._wanted = vllm_layer_ids(layer_ids, target.num_layers)
        self._dtype, self._hidden_size = target.head_weight.dtype, target.head_weight.shape[1]
        self._norm = deepcopy(target.final_norm).to(device)
        self._device = device
        self._timeout = timeout
        self._model: str | None = None  # the name that all servers know it by
        self._threads = ThreadPoolExecutor(REQUESTS_UNDER_WAY * len(replicas), "vllm")

    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        """See `FeatureSource.batch_features`.

        Raises:
            FeatureServerError: no server answers.
            ConfigError: a server refuses a document, or its files are not those of this target.
        """
        shares = shares_of(batch, [[document] for document in batch.documents])
        raw = put_together(batch, shares, self._threads.map(self._fetch, shares), self._device)
        return TargetFeatures(raw.context, self._norm(raw.final))

    def close(self) -> None:
        """Let go of the connections; a batch that is waited for fails."""
        self._replicas.close()
        self._threads.shutdown(cancel_futures=True)

    def check(self, replica: Replica, target: LentTarget, max_length: int) -> None:
        """Ask what the server is, and probe it. Raises ConfigError for what cannot work."""
        models = self._replicas.ask("GET", "/v1/models", _read_json, only=replica)
        try:
            model = models["data"][0]
            name = model["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise ConfigError(f"features.urls: {replica.url}/v1/models lists no model; is this vLLM?") from error
        if self._model not in (None, name):
            raise ConfigError(
                f"features.urls: {replica.url} serves '{name}', the server before it '{self._model}': start all with "
                "the same --served-model-name"
            )
        self._model = name
        longest = model.get("max_model_len")
        if longest is not None and longest <= max_length:
            raise ConfigError(
                f"features.urls: {replica.url} takes {longest} tokens with the one that it adds, but data.max_length="
                f"{max_length}: start vLLM with --max-model-len {max_length + 1}"
            )
        ids = torch.tensor(PROBE) % target.head_weight.shape[0]
        answer, completion = self._ask(ids, only=replica, logprobs=PROBE_TOKENS, return_tokens_as_token_ids=True)
        theirs = _first_logprobs(replica, completion)
        final = self._norm(answer.final[-1].to(self._device)).to(target.head_weight.device)
        ours = functional.linear(final, target.head_weight).float().log_softmax(-1)
        worst = max(abs(ours[token].item() - logprob) for token, logprob in theirs.items() if token < len(ours))
        if not worst <= PROBE_TOLERANCE:
            raise ConfigError(
                f"features.urls: {replica.url} gives tokens after a probe log-probabilities that differ by up to "
                f"{worst:.2f} from those of target.path={target.name_or_path} for the same hidden state: {name} is "
                f"another model, or vLLM extracts other layers than {self._wanted}"
            )

    def _fetch(self, share: Share) -> FeatureAnswer:
        answer, _ = self._ask(share.input_ids)
        return FeatureAnswer(answer.context, answer.final[share.wanted], "", "")

    def _ask(
        self, input_ids: Tensor, only: Replica | None = None, **options: Any
    ) -> tuple[FeatureAnswer, dict[str, Any]]:
        """States of one document, `final` before the norm, and vLLM's whole answer."""
        request = {
            "model": self._model,
            "prompt": input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
        }

        def read(replica: Replica, message: Tensor) -> tuple[FeatureAnswer, dict[str, Any]]:
            completion = _read_json(replica, message)
            try:
                path = Path(completion["kv_transfer_params"]["hidden_states_path"])
            except (KeyError, TypeError) as error:
                raise ConfigError(
                    f"features.urls: {replica.url} answers without kv_transfer_params.hidden_states_path: start vLLM "
                    "with the extract_hidden_states method and ExampleHiddenStatesConnector (docs/features_served.md)"
                ) from error
            states = self._read_states(replica, path, input_ids)
            return FeatureAnswer(states[:, :-1].flatten(1), states[:, -1], "", ""), completion

        body = [memoryview(json.dumps(request | options).encode())]
        return self._replicas.ask("POST", "/v1/completions", read, body=body, only=only)

    def _read_states(self, replica: Replica, path: Path, input_ids: Tensor) -> Tensor:
        """[tokens, layers + 1, hidden]; the file is gone afterwards."""
        lock = path.with_name(path.name + ".lock")
        try:
            with _unlocked(lock, self._timeout, self._replicas.pause):
                tensors = load_file(path)
        except FileNotFoundError as error:
            raise Unavailable(
                f"no file {path}: it must be on a file system that vLLM and this trainer see under the same path"
            ) from error
        except SafetensorError as error:
            raise Unavailable(f"{path}: {error}") from error
        path.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
        states, token_ids = tensors.get("hidden_states"), tensors.get("token_ids")
        if states is None or token_ids is None or token_ids.tolist() != input_ids.tolist():
            raise Unavailable(f"{path} holds other tokens than were asked for")
        expected = [len(input_ids), len(self._wanted), self._hidden_size]
        if states.shape[0] != expected[0]:
            raise Unavailable(
                f"{path} holds {states.shape[0]} states for {expected[0]} tokens: start vLLM with "
                "--no-enable-prefix-caching and --no-enable-chunked-prefill"
            )
        if list(states.shape) != expected or states.dtype != self._dtype:
            dtype = str(self._dtype).removeprefix("torch.")
            raise ConfigError(
                f"features.urls: {replica.url} gives states of {list(states.shape)} {states.dtype}, expected "
                f"{expected} {self._dtype}: start vLLM with eagle_aux_hidden_state_layer_ids={self._wanted} and "
                f"--dtype {dtype}"
            )
        return states


def _first_logprobs(replica: Replica, completion: dict[str, Any]) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens, by token id."""
    try:
        likeliest = completion["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): float(logprob) for token, logprob in likeliest.items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"features.urls: {replica.url} answers without choices[0].logprobs.top_logprobs") from error


def _read_json(replica: Replica, answer: Tensor) -> dict[str, Any]:
    try:
        return json.loads(bytes(answer.numpy()))
    except ValueError as error:
        raise Unavailable(f"an answer that is no JSON: {error}") from error


@contextmanager
def _unlocked(lock: Path, timeout: float, pause: Callable[[float], None]) -> Iterator[None]:
    """Wait until vLLM lets go of the lock, which it holds while it writes. Old versions have none, and have written."""
    if not lock.exists():
        yield
        return
    deadline = time.monotonic() + timeout
    with lock.open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(f"{lock} was held for {timeout:g} s (features.timeout)") from None
                pause(POLL)
        yield
