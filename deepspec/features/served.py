"""features.source=served: the target runs elsewhere, and its features come over HTTP (`deepspec.features.serve`)."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deepspec.config import ConfigError, FeaturesConfig
from deepspec.data.packing import Document, TokenBatch, anchor_candidates
from deepspec.features.replicas import Replica, Replicas, Unavailable
from deepspec.features.wire import (
    FORMAT,
    MEDIA_TYPE,
    TOKEN_VARIABLE,
    FeatureAnswer,
    FeatureRequest,
    WireError,
    decode_answer,
    encode_request,
)
from deepspec.targets import TargetFeatures


def connect_served(
    features: FeaturesConfig, target: LentTarget, layer_ids: Sequence[int], *, device: torch.device, max_length: int
) -> ServedFeatures:
    """The source of `features.urls`, once every server there has said that it serves this target.

    Args:
        target: what it is, not what it computes; nothing of it is kept.
        device: where the features are wanted.
        max_length: tokens of the longest document.

    Raises:
        ConfigError: a server of another target, dtype or format, or with too small a limit.
        FeatureServerError: a server does not answer.
    """
    replicas = Replicas(
        features.urls,
        timeout=features.timeout,
        retry_for=features.retry_for,
        token=os.environ.get(TOKEN_VARIABLE),
        pin_memory=device.type == "cuda",
    )
    identity = TargetIdentity.of(target)
    healths = [replicas.ask("GET", "/health", _read_health, only=replica) for replica in replicas.replicas]
    for replica, health in zip(replicas.replicas, healths, strict=True):
        _check_health(replica.url, health, identity, layer_ids, max_length)
    return ServedFeatures(
        replicas,
        identity,
        layer_ids,
        wire_dtype=identity.dtype if features.dtype is None else getattr(torch, features.dtype),
        device=device,
        request_tokens=min(health["limits"]["batch_tokens"] for health in healths),
    )


class LentTarget(Protocol):
    """What a trainer knows of a target that runs elsewhere."""

    name_or_path: str
    revision: str | None

    @property
    def num_layers(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]"""

    @property
    def final_norm(self) -> nn.Module: ...


class TargetIdentity(NamedTuple):
    """Which target features must come from."""

    name: str
    fingerprint: str
    dtype: torch.dtype
    hidden_size: int

    @classmethod
    def of(cls, target: LentTarget) -> TargetIdentity:
        head = target.head_weight
        return cls(target.name_or_path, target.fingerprint, head.dtype, head.shape[1])


class ServedFeatures:
    """Splits each batch over the servers and puts the answers together.

    Only states that can carry loss travel: the final state is zero where no block can start.
    """

    concurrency = 2  # one batch is computed while another travels
    flops_per_token = 0.0
    is_remote = True

    def __init__(
        self,
        replicas: Replicas,
        target: TargetIdentity,
        layer_ids: Sequence[int],
        *,
        wire_dtype: torch.dtype,
        device: torch.device,
        request_tokens: int,
    ):
        self._replicas = replicas
        self._target = target
        self._layer_ids = tuple(layer_ids)
        self._wire_dtype = wire_dtype
        self._device = device
        self._request_tokens = request_tokens
        self._threads = ThreadPoolExecutor(self.concurrency * len(replicas), "served")

    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        """See `FeatureSource.batch_features`.

        Raises:
            FeatureServerError: no server answers.
            ConfigError: a server does not serve this target any more.
        """
        shares = shares_of(batch, split_documents(batch.documents, len(self._replicas), self._request_tokens))
        answers = [self._fetch(shares[0])] if len(shares) == 1 else self._threads.map(self._fetch, shares)
        features = put_together(batch, shares, answers, self._device)
        return TargetFeatures(features.context.to(self._target.dtype), features.final.to(self._target.dtype))

    def close(self) -> None:
        """Let go of the connections; a batch that is waited for fails."""
        self._replicas.close()
        self._threads.shutdown(cancel_futures=True)

    def _fetch(self, share: Share) -> FeatureAnswer:
        request = FeatureRequest(
            input_ids=share.input_ids.int(),
            lengths=tuple(document.length for document in share.documents),
            final_places=share.wanted.nonzero()[:, 0].int(),
            layer_ids=self._layer_ids,
            dtype=self._wire_dtype,
            id=uuid.uuid4().hex,
        )

        def read(replica: Replica, message: Tensor) -> FeatureAnswer:
            try:
                answer = decode_answer(message, request, self._target.hidden_size)
            except WireError as error:
                raise Unavailable(f"an answer that cannot be used: {error}") from error
            _check_fingerprint(replica.url, answer.fingerprint, self._target)
            return answer

        return self._replicas.ask("POST", "/features", read, body=encode_request(request), content_type=MEDIA_TYPE)


class Share(NamedTuple):
    """The documents of one request."""

    documents: Sequence[Document]
    input_ids: Tensor  # long [tokens], documents behind one another
    places: Tensor  # long [tokens], their places in the flattened batch
    wanted: Tensor  # bool [tokens], where the final state can carry loss


def shares_of(batch: TokenBatch, groups: Iterable[Sequence[Document]]) -> list[Share]:
    """The requests that a batch becomes, one for each group of its documents."""
    candidates = anchor_candidates(batch.loss_mask, batch.position_ids).flatten()
    input_ids, width = batch.input_ids.flatten(), batch.input_ids.shape[1]
    shares = []
    for documents in groups:
        starts = [document.row * width + document.start for document in documents]
        ranges = [torch.arange(start, start + each.length) for start, each in zip(starts, documents, strict=True)]
        places = torch.cat(ranges)
        shares.append(Share(documents, input_ids[places], places, candidates[places]))
    return shares


def split_documents(documents: Sequence[Document], parts: int, most_tokens: int) -> list[list[Document]]:
    """About `parts` groups of about as many tokens, in order, none with more than `most_tokens`.

    Raises:
        ConfigError: a document alone has more.
    """
    aim = -(-sum(document.length for document in documents) // parts)
    groups: list[list[Document]] = []
    tokens = 0
    for document in documents:
        if document.length > most_tokens:
            raise ConfigError(
                f"a document of {document.length} tokens, but a server of features.urls takes {most_tokens}: "
                "start the servers with a larger batch_tokens"
            )
        if not groups or tokens + document.length > most_tokens or tokens >= aim:
            groups.append([])
            tokens = 0
        groups[-1].append(document)
        tokens += document.length
    return groups


def put_together(
    batch: TokenBatch, shares: Sequence[Share], answers: Iterable[FeatureAnswer], device: torch.device
) -> TargetFeatures:
    """Features of the batch on `device`, zero at padding and, for `final`, where it is not wanted."""
    context = final = torch.empty(0)
    for share, answer in zip(shares, answers, strict=True):
        if not context.numel():
            shape = batch.input_ids.shape
            context = torch.zeros(*shape, answer.context.shape[-1], dtype=answer.context.dtype, device=device)
            final = torch.zeros(*shape, answer.final.shape[-1], dtype=answer.final.dtype, device=device)
        start = 0
        for document in share.documents:
            part = answer.context[start : start + document.length]
            context[document.row, document.columns].copy_(part, non_blocking=True)
            start += document.length
        wanted = share.places[share.wanted].to(device, non_blocking=True)
        final.flatten(0, 1)[wanted] = answer.final.to(device, non_blocking=True)
    return TargetFeatures(context, final)


def _read_health(replica: Replica, answer: Tensor) -> dict[str, Any]:
    try:
        health = json.loads(bytes(answer.numpy()))
        version, _ = health["format"], health["limits"]["batch_tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"features.urls: {replica.url} is no feature server: {replica.url}/health says no") from error
    if version != FORMAT:
        raise ConfigError(
            f"features.urls: {replica.url} speaks format {version}, this trainer format {FORMAT}: "
            "install the same version of deepspec on both"
        )
    return health


def _check_health(
    url: str, health: dict[str, Any], target: TargetIdentity, layer_ids: Sequence[int], max_length: int
) -> None:
    _check_fingerprint(url, health["fingerprint"], target, health["target"])
    first, last = health["layer_ids"]
    if not all(first <= layer_id <= last for layer_id in layer_ids):
        raise ConfigError(
            f"features.urls: {url} serves the layers {first} to {last}, but draft.target_layer_ids={list(layer_ids)}"
        )
    dtype = str(target.dtype).removeprefix("torch.")
    if health["dtype"] != dtype:
        raise ConfigError(
            f"features.urls: {url} computes in {health['dtype']}, but target.dtype={dtype}: start the server with "
            f"dtype={dtype}, or train with target.dtype={health['dtype']}"
        )
    if max_length > health["limits"]["batch_tokens"]:
        raise ConfigError(
            f"features.urls: {url} takes at most {health['limits']['batch_tokens']} tokens, but "
            f"data.max_length={max_length}: start the server with batch_tokens={max_length} or more"
        )


def _check_fingerprint(url: str, fingerprint: str, target: TargetIdentity, name: str = "another target") -> None:
    if fingerprint != target.fingerprint:
        raise ConfigError(
            f"features.urls: {url} serves {name} with fingerprint {fingerprint}, but target.path="
            f"{target.name} has {target.fingerprint}: start the server with target={target.name}"
        )
