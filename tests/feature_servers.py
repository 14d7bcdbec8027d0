"""Feature servers for tests: in a thread, where a test can look inside, and in a process, which a test can kill."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

import torch
import urllib3
import uvicorn

from deepspec.data.packing import Sample, TokenBatch, lay_out
from deepspec.features.engine import FeatureEngine, Limits
from deepspec.features.serve import FeatureServer, ServeOptions, create_app, serve
from deepspec.targets import Target


class QuietHandler(BaseHTTPRequestHandler):
    """Of stand-ins for a server, which keep connections open and log nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server whose requests `handler` answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class RunningServer:
    url: str
    engine: FeatureEngine
    server: FeatureServer
    thread: threading.Thread

    def stop(self) -> None:
        """As a signal does."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.engine.close()


@contextmanager
def serving(
    target: Target,
    *,
    batch_tokens: int = 4096,
    max_queue: int = 8,
    merge_requests: bool = True,
    body_seconds: float = 5.0,
    token: str | None = None,
) -> Iterator[RunningServer]:
    """A server in a thread of this process."""
    engine = FeatureEngine(target, Limits(batch_tokens, max_queue, merge_requests))
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(engine, body_seconds=body_seconds, token=token)
    server = FeatureServer(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_keep_alive=600), engine)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    running = RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, server, thread)
    try:
        yield running
    finally:
        running.stop()


class Gate:
    """Stands before the target's forward pass: lets it through, holds it, or makes it fail."""

    def __init__(self, target: Target, monkeypatch):
        self.open = threading.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)
        self.batches: list[TokenBatch] = []
        self.fails_for = lambda batch: False
        original = target.features

        def features(batch, layer_ids):
            self.batches.append(batch)
            self.arrived.release()
            assert self.open.wait(30)
            if self.fails_for(batch):
                raise RuntimeError("out of memory, say")
            return original(batch, layer_ids)

        monkeypatch.setattr(target, "features", features)

    def hold(self) -> None:
        self.open.clear()


def _serve(options: ServeOptions) -> None:
    torch.set_num_threads(1)
    serve(options)


def prepare_processes() -> None:
    """Let the fork server import in the background what every server process needs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["deepspec.features.serve", "deepspec.training.loop", "training_world"])
    forkserver.ensure_running()


def start_process(target: str, port: int, **options) -> BaseProcess:
    """A server in a process of its own; returns when it is ready."""
    prepare_processes()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_serve, args=(ServeOptions(target=target, port=port, device="cpu", **options),))
    process.start()
    wait_until_ready(port, process.is_alive)
    return process


def wait_until_ready(port: int, is_alive) -> None:
    deadline = time.monotonic() + 90
    while is_alive() and time.monotonic() < deadline:
        try:
            if urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=False, timeout=5).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            time.sleep(0.05)
    raise AssertionError("the server did not start")


def samples(lengths: list[int], vocab_size: int = 280) -> list[Sample]:
    """Random documents, of which the second half is the assistant's."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [
        Sample(
            index=i,
            epoch=0,
            id=f"row{i}",
            input_ids=torch.randint(0, vocab_size, (length,), generator=generator).tolist(),
            loss_mask=[int(token >= length // 2) for token in range(length)],
        )
        for i, length in enumerate(lengths)
    ]


def padded(lengths: list[int]) -> TokenBatch:
    return lay_out([[sample] for sample in samples(lengths)], pad_id=0)


def packed(lengths: list[int]) -> TokenBatch:
    return lay_out([samples(lengths)], pad_id=0)
