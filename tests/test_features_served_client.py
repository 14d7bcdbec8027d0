"""features.source=served: the features of the online source, or a clear end."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from feature_servers import (
    Gate,
    QuietHandler,
    answering,
    packed,
    padded,
    prepare_processes,
    serving,
    start_process,
)
from training_world import changed, free_port, tiny_run
from transformers import AutoModelForCausalLM

from deepspec.config import ConfigError, FeaturesConfig, validate
from deepspec.data.packing import anchor_candidates
from deepspec.features import FeatureQueue, OnlineFeatures
from deepspec.features.replicas import FeatureServerError, Replicas
from deepspec.features.served import ServedFeatures, TargetIdentity, connect_served, split_documents
from deepspec.features.wire import TOKEN_VARIABLE
from deepspec.targets import Target, load_target

LAYERS = [0, 2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load(training_world):
    """`load()`: the target again, for a server's own thread."""
    prepare_processes()
    return lambda: load_target(str(training_world / "target"))


@pytest.fixture(scope="module")
def target(load):
    return load()


@pytest.fixture(scope="module")
def server(load):
    with serving(load()) as running:
        yield running


@pytest.fixture
def connect(target):
    """`connect([url, ...], **features)`: a source, closed after the test."""
    sources: list[ServedFeatures] = []

    def make(urls, *, layer_ids=LAYERS, max_length=64, target=target, **features):
        config = FeaturesConfig(source="served", urls=urls, **({"timeout": 20.0, "retry_for": 20.0} | features))
        sources.append(connect_served(config, target, layer_ids, device=CPU, max_length=max_length))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def unchecked(target, urls, *, timeout=5, retry_for=5):
    """A source that did not ask the servers at the start."""
    return ServedFeatures(
        Replicas(urls, timeout=timeout, retry_for=retry_for),
        TargetIdentity.of(target),
        LAYERS,
        wire_dtype=torch.float32,
        device=CPU,
        request_tokens=4096,
    )


def online(target, batch):
    return OnlineFeatures(target, LAYERS).batch_features(batch)


def real_tokens(batch):
    mask = torch.zeros_like(batch.loss_mask)
    for document in batch.documents:
        mask[document.row, document.columns] = True
    return mask


def assert_same(served, online, batch, **tolerance):
    """Where it counts; zero elsewhere."""
    wanted, tokens = anchor_candidates(batch.loss_mask, batch.position_ids), real_tokens(batch)
    torch.testing.assert_close(served.context[tokens], online.context[tokens], **tolerance)
    torch.testing.assert_close(served.final[wanted], online.final[wanted], **tolerance)
    assert not served.context[~tokens].any()
    assert not served.final[~wanted].any()


def test_a_packed_row_is_exactly_the_online_one(server, target, connect):
    batch = packed([12, 1, 40, 7])
    served = connect([server.url]).batch_features(batch)
    assert served.context.shape == (1, 60, 64)
    assert_same(served, online(target, batch), batch, rtol=0, atol=0)


def test_padded_rows_differ_by_rounding_at_most(server, target, connect):
    batch = padded([12, 1, 40, 7])
    assert_same(connect([server.url]).batch_features(batch), online(target, batch), batch, rtol=1e-5, atol=1e-5)


def test_split_over_two_replicas(load, target, connect):
    batch = packed([9, 30, 12, 12, 25])
    with serving(load()) as first, serving(load()) as second:
        served = connect([first.url, second.url]).batch_features(batch)
        assert first.engine.counts.requests == second.engine.counts.requests == 1
    assert_same(served, online(target, batch), batch, rtol=1e-5, atol=1e-5)


def test_split_by_the_limit_of_the_server(load, target, connect):
    batch = packed([30, 30, 30, 5])
    with serving(load(), batch_tokens=64, merge_requests=False) as server:
        served = connect([server.url]).batch_features(batch)
        assert server.engine.counts.requests == 2
    assert_same(served, online(target, batch), batch, rtol=1e-5, atol=1e-5)


def test_bfloat16_on_the_wire(server, target, connect):
    batch = packed([20, 30])
    served = connect([server.url], dtype="bfloat16").batch_features(batch)
    assert served.context.dtype == torch.float32
    assert_same(served, online(target, batch), batch, rtol=1e-2, atol=1e-2)


def test_nothing_supervised(server, target, connect):
    batch = packed([1, 1])
    served = connect([server.url]).batch_features(batch)
    assert_same(served, online(target, batch), batch, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("lengths", "parts", "most", "expected"),
    [
        ([10, 10, 10, 10], 2, 100, [[10, 10], [10, 10]]),
        ([10, 10, 10, 10], 1, 25, [[10, 10], [10, 10]]),
        ([30, 1, 1], 3, 100, [[30], [1, 1]]),
        ([5], 4, 100, [[5]]),
        ([1, 30, 1], 2, 30, [[1], [30], [1]]),
    ],
)
def test_split_documents(lengths, parts, most, expected):
    groups = split_documents(packed(lengths).documents, parts, most)
    assert [[document.length for document in group] for group in groups] == expected


def test_another_target(server, target, connect, golden_target):
    with pytest.raises(ConfigError) as error:
        connect([server.url], target=golden_target)
    assert f"features.urls: {server.url} serves {target.name_or_path}" in str(error.value)
    assert target.fingerprint in str(error.value)
    assert golden_target.fingerprint in str(error.value)
    assert f"start the server with target={golden_target.name_or_path}" in str(error.value)


def test_layers_dtype_and_length_that_do_not_fit(server, target, connect, monkeypatch):
    with pytest.raises(ConfigError, match=r"serves the layers -1 to 3, but draft.target_layer_ids=\[0, 4\]"):
        connect([server.url], layer_ids=[0, 4])
    with pytest.raises(ConfigError, match=r"takes at most 4096 tokens, but data.max_length=5000.*batch_tokens=5000"):
        connect([server.url], max_length=5000)
    monkeypatch.setattr(type(target), "head_weight", target.head_weight.bfloat16())
    with pytest.raises(ConfigError, match=r"computes in float32, but target.dtype=bfloat16"):
        connect([server.url])


def test_not_a_feature_server(connect):
    with stand_in(lambda handler: answer(handler, 200, b"<html>")) as url, pytest.raises(ConfigError) as error:
        connect([url])
    assert f"{url} is no feature server" in str(error.value)
    with stand_in(lambda handler: answer(handler, 404, b"nothing here")) as url, pytest.raises(ConfigError) as error:
        connect([url])
    assert f"{url}/health answered 404: nothing here" in str(error.value)


def test_token(target, connect, monkeypatch):
    with serving(target, token="secret") as server:
        source = connect([server.url])
        with pytest.raises(ConfigError, match=f"answered 401: wrong or missing token: set {TOKEN_VARIABLE}"):
            source.batch_features(packed([5]))
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        connect([server.url]).batch_features(packed([5]))


def test_connections_are_kept(server, connect):
    source = connect([server.url])
    for _ in range(3):
        source.batch_features(packed([5]))
    pools = source._replicas._http.pools
    assert sum(pools[key].num_connections for key in list(pools.keys())) == 1


def test_batches_in_order_with_a_lookahead(load, target, connect):
    """Two are under way at once, whichever answer comes first."""
    batches = [packed([length]) for length in (40, 3, 30, 4, 20)]
    with serving(load(), merge_requests=False) as server:
        queue = FeatureQueue(connect([server.url]), lookahead=3, device=CPU)
        queue.announce(batches)
        for batch in batches:
            assert_same(queue.next(), online(target, batch), batch, rtol=1e-5, atol=1e-5)
        queue.close()


@contextmanager
def stand_in(handle):
    """Something that speaks HTTP and misbehaves: `handle(handler)` for each request."""

    class Handler(QuietHandler):
        def do_GET(self):
            handle(self)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            handle(self)

    with answering(Handler) as url:
        yield url


def answer(handler, status, body, **headers):
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def silent(handler):
    time.sleep(0.6)
    handler.close_connection = True


def half(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"half")
    handler.close_connection = True


def dripping(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "4000000")
    handler.end_headers()
    for _ in range(10):
        handler.wfile.write(b"x" * 400_000)
        time.sleep(0.15)


def hang_up(handler):
    handler.close_connection = True


@pytest.mark.parametrize(
    ("misbehave", "cause"),
    [
        (silent, "ReadTimeoutError"),
        (dripping, r"sent 1048576 of 4000000 bytes in 0.3 s \(features.timeout\)"),
        (half, "IncompleteRead|broke off after 4 of 1000 bytes"),
        (hang_up, "ProtocolError"),
        (lambda handler: answer(handler, 500, b'{"error": "out of memory"}'), "500: out of memory"),
        (lambda handler: answer(handler, 503, b'{"error": "full"}', Retry_After="0"), "503: full"),
        (lambda handler: answer(handler, 200, b"garbage " * 9), "an answer that cannot be used: .*no safetensors"),
    ],
)
def test_failures_that_may_pass_are_tried_again_and_then_named(target, misbehave, cause, caplog):
    with stand_in(misbehave) as url:
        source = unchecked(target, [url], timeout=0.3, retry_for=0.7)
        started = time.monotonic()
        with pytest.raises(FeatureServerError) as error:
            source.batch_features(packed([5]))
        assert 0.6 < time.monotonic() - started < 5
    assert "no feature server of features.urls answered for 0.7 s (features.retry_for)" in str(error.value)
    assert url in str(error.value)
    assert "run the same command: training continues from its newest checkpoint" in str(error.value)
    assert re.search(cause, str(error.value))
    assert f"{url}: " in caplog.text
    assert "trying again for at most 0 s" in caplog.text
    with pytest.raises(FeatureServerError):
        source.batch_features(packed([5]))


def test_nobody_listens(connect):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(FeatureServerError, match=f"{url}: NewConnectionError.*refused"):
        connect([url], retry_for=0.5)


def test_a_bad_replica_is_left_alone_while_another_answers(target, server):
    calls = []

    def fail(handler):
        calls.append(time.monotonic())
        hang_up(handler)

    with stand_in(fail) as url:
        source = unchecked(target, [url, server.url])
        batch = packed([5, 6, 7, 8])
        started = time.monotonic()
        while time.monotonic() - started < 1.5:
            assert_same(source.batch_features(batch), online(target, batch), batch, rtol=1e-5, atol=1e-5)
    assert 2 <= len(calls) <= 8
    pauses = [later - earlier for earlier, later in pairwise(calls)]
    assert max(pauses) > 0.25, "longer and longer"


def test_full_queues_are_waited_for(target, connect, monkeypatch):
    gate = Gate(target, monkeypatch)
    with serving(target, max_queue=1, merge_requests=False) as server, ThreadPoolExecutor(4) as pool:
        sources = [connect([server.url]) for _ in range(4)]
        gate.hold()
        futures = [pool.submit(source.batch_features, packed([5 + i])) for i, source in enumerate(sources)]
        time.sleep(0.3)
        gate.open.set()
        for i, future in enumerate(futures):
            assert future.result().context.shape == (1, 5 + i, 64)


@contextmanager
def nobody():
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def never_answering():
    asked, over = threading.Event(), threading.Event()

    def hold(handler):
        asked.set()
        over.wait(30)
        handler.close_connection = True

    with stand_in(hold) as url:
        yield url
        assert asked.is_set()
        over.set()


@pytest.mark.parametrize("server", [nobody, never_answering])
def test_closing_ends_the_waiting(target, server, caplog):
    with server() as url, ThreadPoolExecutor(1) as pool:
        source = unchecked(target, [url], timeout=20, retry_for=60)
        future = pool.submit(source.batch_features, packed([5]))
        time.sleep(0.2)
        warned = caplog.text
        source.close()
        with pytest.raises(FeatureServerError, match="closed"):
            future.result(timeout=1)
    assert caplog.text == warned, "the closing is no failure of a server"


def test_a_server_that_comes_back_with_another_target(target, training_world, server, tmp_path):
    """Same address, same shapes, other weights: nothing is trained on them."""
    model = AutoModelForCausalLM.from_pretrained(training_world / "target")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    with serving(Target(model, "retrained")) as other:
        source = unchecked(target, [other.url])
        with pytest.raises(
            ConfigError, match=f"{other.url} serves another target with fingerprint (?!{target.fingerprint})"
        ):
            source.batch_features(packed([5]))


def test_one_of_two_replicas_is_killed(target, training_world, server, connect):
    port = free_port()
    process = start_process(str(training_world / "target"), port)
    source = connect([server.url, f"http://127.0.0.1:{port}"], retry_for=10.0)
    batch = packed([9, 30, 12, 25])
    first = source.batch_features(batch)
    process.kill()
    process.join()
    for _ in range(3):
        again = source.batch_features(batch)
        torch.testing.assert_close(again.context, first.context, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"source": "served"}, r"features.urls=\[\]: features.source=served needs at least one"),
        ({"source": "vllm"}, r"features.urls=\[\]: features.source=vllm needs at least one"),
        ({"urls": ["http://a:1"]}, "only features.source=served or vllm asks servers"),
        ({"source": "served", "urls": ["a:1"]}, "features.urls: a:1: must begin with http://"),
        ({"source": "vllm", "urls": ["http://a:1"], "dtype": "bfloat16"}, "features.dtype=bfloat16: only"),
        ({"source": "served", "urls": ["http://a:1"], "dtype": "int8"}, "features.dtype=int8: must be one of float32"),
        ({"source": "served", "urls": ["http://a:1"], "timeout": 0.0}, "features.timeout=0.0: must be at least 0.01"),
        ({"source": "servd"}, "Did you mean 'served'"),
    ],
)
def test_configurations_that_cannot_work(training_world, tmp_path, features, message):
    with pytest.raises(ConfigError, match=message):
        validate(changed(tiny_run(training_world, tmp_path), features=features))
