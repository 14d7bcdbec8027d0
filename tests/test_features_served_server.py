"""The feature server: what it answers, what it refuses and how, and that no request can take it down."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import urllib3
from feature_servers import Gate, serving

from deepspec.config import ConfigError
from deepspec.features.engine import row_of_documents
from deepspec.features.serve import ServeOptions, serve
from deepspec.features.wire import FeatureRequest, decode_answer, encode_request
from deepspec.targets import load_target

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def target(training_world):
    return load_target(str(training_world / "target"))


@pytest.fixture(scope="module")
def server(target):
    with serving(target, batch_tokens=256) as running:
        yield running


def documents(*lengths, layer_ids=LAYERS, id="x", first=3):
    ids = torch.cat([torch.arange(first, first + length) for length in lengths]).int()
    places = torch.arange(0, len(ids), 2).int()
    return FeatureRequest(ids, lengths, places, layer_ids, torch.float32, id)


def post(server, request, **headers):
    body = b"".join(encode_request(request)) if isinstance(request, FeatureRequest) else request
    return urllib3.request("POST", f"{server.url}/features", body=body, headers=headers, retries=False, timeout=30)


def health(server):
    return urllib3.request("GET", f"{server.url}/health", retries=False).json()


def read(response, request):
    assert response.status == 200, response.data
    return decode_answer(torch.frombuffer(bytearray(response.data), dtype=torch.uint8), request, hidden_size=32)


def expected(target, request):
    features = target.features(row_of_documents([request]), request.layer_ids)
    return features.context[0], features.final[0][request.final_places.long()]


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_features_are_those_of_the_target(server, target):
    request = documents(7, 20, 1)
    answer = read(post(server, request), request)
    context, final = expected(target, request)
    assert torch.equal(answer.context, context)
    assert torch.equal(answer.final, final)
    assert answer.fingerprint == target.fingerprint


def test_health(server, target):
    report = health(server)
    assert report["ready"]
    assert (report["target"], report["fingerprint"]) == (target.name_or_path, target.fingerprint)
    assert (report["dtype"], report["hidden_size"], report["layer_ids"]) == ("float32", 32, [-1, 3])
    assert report["limits"] == {"batch_tokens": 256, "max_queue": 8, "merge_requests": True}
    assert report["waiting"] == 0


@pytest.mark.parametrize(
    ("request_or_bytes", "status", "message"),
    [
        (b"", 400, "an empty body"),
        (b"garbage" * 9, 400, "no safetensors message: the header's length is wrong"),
        (b"".join(encode_request(documents(4)))[:-1], 400, "a tensor of [2] I32 cannot lie at bytes"),
        (b"".join(encode_request(documents(4))) + b"more", 400, "the header describes"),
        (b"x" * 100_000, 413, "the body has 100000 bytes, at most"),
        (documents(200, 57), 422, "257 tokens, but batch_tokens=256"),
        (documents(3, first=278), 422, "input_ids reach from 278 to 280, but"),
        (documents(3, first=-1), 422, "input_ids reach from -1 to 1, but"),
        (documents(3, layer_ids=(0, 4)), 422, "layer_ids=[0, 4]: must be different and lie in -1 to 3"),
        (documents(3, layer_ids=(1, 1)), 422, "layer_ids=[1, 1]: must be different"),
    ],
)
def test_what_is_refused(server, request_or_bytes, status, message):
    response = post(server, request_or_bytes)
    assert response.status == status
    assert message in response.json()["error"]
    assert health(server)["ready"]


def test_wrong_method_and_path(server):
    assert urllib3.request("GET", f"{server.url}/features", retries=False).status == 405
    assert urllib3.request("POST", f"{server.url}/elsewhere", retries=False).status == 404


def raw(server, text: bytes, *, close=False) -> bytes:
    """What the server answers until it ends the connection."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as connection:
        connection.sendall(text)
        if close:
            return b""
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_bodies_that_do_not_match_their_length(target):
    head = b"POST /features HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    with serving(target, body_seconds=0.3) as server:
        assert b"411" in raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n").split(b"\r\n")[0]
        short = raw(server, head + b"Content-Length: 500\r\n\r\nhalf")
        assert short.startswith(b"HTTP/1.1 408")
        assert b"4 of 500 bytes came in 0.3 s" in short
        raw(server, head + b"Content-Length: 500\r\n\r\nhalf", close=True)
        assert raw(server, b"\x16\x03\x01 no HTTP at all\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert health(server)["ready"]


def test_token(target):
    with serving(target, token="secret") as server:
        request = documents(5)
        assert post(server, request).status == 401
        assert post(server, request, Authorization="Bearer other").status == 401
        assert post(server, request, Authorization="Bearer secret").status == 200
        assert health(server)["ready"], "health needs none"


@pytest.fixture
def gate(target, monkeypatch):
    return Gate(target, monkeypatch)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as threads:
        yield threads


def test_requests_that_wait_share_a_forward_pass(target, gate, pool):
    with serving(target, batch_tokens=30) as server:
        gate.hold()
        first = pool.submit(post, server, documents(4))
        assert gate.arrived.acquire(timeout=10)
        requests = [documents(9, id="a"), documents(9, 2, id="b"), documents(11, id="c"), documents(2, id="d")]
        waiting = []
        for number, request in enumerate(requests):
            waiting.append(pool.submit(post, server, request))
            wait_for(lambda number=number: server.engine.waiting == number + 1)
        other_layers = pool.submit(post, server, documents(3, layer_ids=(1,)))
        wait_for(lambda: server.engine.waiting == 5)
        gate.open.set()
        first.result()
        answers = [read(future.result(), request) for future, request in zip(waiting, requests, strict=True)]
        assert other_layers.result().status == 200
    assert [[document.length for document in batch.documents] for batch in gate.batches] == [
        [4],
        [9, 9, 2],  # 11 more would be 31
        [11, 2],
        [3],
    ]
    for request, answer in zip(requests, answers, strict=True):
        context, final = expected(target, request)
        torch.testing.assert_close(answer.context, context, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer.final, final, rtol=1e-5, atol=1e-5)


def test_requests_kept_apart(target, gate, pool):
    with serving(target, merge_requests=False) as server:
        gate.hold()
        futures = [pool.submit(post, server, documents(4)) for _ in range(4)]
        wait_for(lambda: server.engine.waiting == 3)
        gate.open.set()
        assert [future.result().status for future in futures] == [200] * 4
    assert len(gate.batches) == 4


def test_full_queue(target, gate, pool):
    with serving(target, max_queue=2) as server:
        gate.hold()
        running = pool.submit(post, server, documents(4))
        assert gate.arrived.acquire(timeout=10)
        waiting = [pool.submit(post, server, documents(4)) for _ in range(2)]
        wait_for(lambda: server.engine.waiting == 2)
        refused = post(server, documents(4))
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["error"] == "2 requests are waiting, which is max_queue"
        assert health(server)["waiting"] == 2
        gate.open.set()
        assert [future.result().status for future in (running, *waiting)] == [200] * 3


def test_a_failure_fails_its_own_request_alone(target, gate, pool):
    with serving(target) as server:
        gate.hold()
        pool.submit(post, server, documents(4))
        assert gate.arrived.acquire(timeout=10)
        gate.fails_for = lambda batch: any(document.length == 13 for document in batch.documents)
        good, bad = pool.submit(post, server, documents(5)), pool.submit(post, server, documents(13))
        wait_for(lambda: server.engine.waiting == 2)
        gate.open.set()
        assert good.result().status == 200
        assert bad.result().status == 500
        assert bad.result().json()["error"] == "the target failed: RuntimeError: out of memory, say"
        assert post(server, documents(6)).status == 200


def test_a_client_that_goes_away_takes_its_request_with_it(target, gate, pool):
    with serving(target) as server:
        gate.hold()
        running = pool.submit(post, server, documents(4))
        assert gate.arrived.acquire(timeout=10)
        body = b"".join(encode_request(documents(5)))
        head = f"POST /features HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        port = int(server.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head + body)
            wait_for(lambda: server.engine.waiting == 1)
        after = pool.submit(post, server, documents(6))
        time.sleep(0.2)
        gate.open.set()
        assert running.result().status == after.result().status == 200
        assert server.engine.counts.requests == 2


def test_shutdown_finishes_what_runs_and_refuses_the_rest(target, gate, pool):
    with serving(target) as server:
        gate.hold()
        running = pool.submit(post, server, documents(4))
        assert gate.arrived.acquire(timeout=10)
        waiting = pool.submit(post, server, documents(5))
        wait_for(lambda: server.engine.waiting == 1)
        server.server.should_exit = True
        refused = waiting.result()
        assert (refused.status, refused.json()["error"]) == (503, "the server is shutting down")
        with pytest.raises(urllib3.exceptions.HTTPError):
            post(server, documents(6))
        gate.open.set()
        assert running.result().status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype=int8: must be one of auto, float32, bfloat16, float16"),
        ({"batch_tokens": 0}, "batch_tokens=0: must be above 0"),
        ({"port": 70000}, "host=127.0.0.1 port=70000: cannot listen there"),
        ({"host": "no.such.host.invalid"}, "host=no.such.host.invalid port=8900: cannot listen there"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        serve(ServeOptions(**options))


def test_port_that_is_taken(server):
    with pytest.raises(ConfigError, match="cannot listen there"):
        serve(ServeOptions(port=int(server.url.rsplit(":", 1)[1])))
