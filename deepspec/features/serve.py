"""A feature server: `python -m deepspec.features.serve target=Qwen/Qwen3-8B dtype=bfloat16`, one per target replica.

    GET  /health    what is served, how busy it is and its limits, as JSON
    POST /features  documents in, features out (`deepspec.features.wire`)

An error is JSON {"error": message} with 400 (not a request), 401 (wrong token), 408 (the body did not arrive in time),
411 (no Content-Length), 413 (too large), 422 (ids or layers that the target does not have), 500 (the target failed on
this request) or 503 with Retry-After (queue full, or shutting down).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deepspec.arguments import run_command
from deepspec.config import CHOICES, ConfigError
from deepspec.features.engine import Answered, FeatureEngine, Limits, QueueFull, ShuttingDown
from deepspec.features.wire import (
    FORMAT,
    MAX_HEADER,
    MEDIA_TYPE,
    TOKEN_VARIABLE,
    FeatureAnswer,
    WireError,
    decode_request,
    encode_answer,
)
from deepspec.targets import describe_target, dtype_name, load_target

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes handed to the socket at once; whole answers at once cost five times the CPU time
RETRY_AFTER = 1  # seconds
KEEP_ALIVE = 600  # seconds that an idle connection stays open: longer than a training step


@dataclass
class ServeOptions:
    """Serve the features of a target over HTTP, for training with features.source=served."""

    target: str = "builtin"  # "builtin", a folder, or a Hub id
    revision: str | None = None  # Hub branch, tag or commit
    gguf_file: str | None = None  # name of a GGUF file there, which holds the model
    dtype: str = "auto"  # computing dtype of the target: auto (the checkpoint's own), float32, bfloat16, float16
    device: str | None = None  # cpu, cuda, cuda:1, ...; null = an accelerator if there is one
    device_map: str | None = None  # spread over several GPUs: auto, balanced, balanced_low_0, sequential; null = on one
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 = all, only in a network that you trust
    port: int = 8900  # 0 = any free one
    batch_tokens: int = 16384  # tokens of one forward pass, and so the largest request and the longest document
    max_queue: int = 64  # requests waiting; one more is answered 503
    merge_requests: bool = True  # documents of several requests in one forward pass
    body_seconds: float = 30.0  # in which a request's body must arrive
    grace_seconds: int = 60  # after SIGTERM, for what is being computed and sent


class Refusal(Exception):
    """Answered with a status and a message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def create_app(engine: FeatureEngine, *, body_seconds: float = 30.0, token: str | None = None) -> Starlette:
    """The HTTP side of an engine."""
    engine_info = {
        "format": FORMAT,
        "target": engine.target.name_or_path,
        "revision": engine.target.revision,
        "fingerprint": engine.target.fingerprint,
        "dtype": str(engine.target.dtype).removeprefix("torch."),
        "num_layers": engine.target.num_layers,
        "hidden_size": engine.target.hidden_size,
        "vocab_size": engine.target.vocab_size,
        "layer_ids": [-1, engine.target.num_layers - 1],  # any of this range, chosen by each request
        "limits": vars(engine.limits),
    }

    async def health(request: Request) -> Response:
        counts = engine.counts
        state = {"ready": engine.is_open, "waiting": engine.waiting, "done": vars(counts)}
        return JSONResponse(state | engine_info, status_code=200 if engine.is_open else 503)

    async def features(request: Request) -> Response:
        try:
            if token is not None and not _has_token(request, token):
                raise Refusal(401, f"wrong or missing token: set {TOKEN_VARIABLE} as on the server")
            body = await _read_body(request, limit=_largest_body(engine.limits), seconds=body_seconds)
            wanted = decode_request(torch.frombuffer(body, dtype=torch.uint8))
            engine.check_request(wanted)
            answer = await _result_or_disconnect(engine.submit(wanted), request)
        except Refusal as refusal:
            return _error(refusal.status, str(refusal))
        except WireError as error:
            return _error(400, str(error))
        except (QueueFull, ShuttingDown) as error:
            return _error(503, str(error), {"Retry-After": str(RETRY_AFTER)})
        except ValueError as error:
            return _error(422, str(error))
        except ClientDisconnect:
            return _error(400, "the client went away")
        except Exception as error:
            return _error(500, f"the target failed: {type(error).__name__}: {error}")
        pieces = encode_answer(answer)
        length = str(sum(len(piece) for piece in pieces))
        return StreamingResponse(_chunks(pieces), media_type=MEDIA_TYPE, headers={"Content-Length": length})

    return Starlette(routes=[Route("/health", health), Route("/features", features, methods=["POST"])])


def serve(options: ServeOptions) -> None:
    """Load the target and serve it until SIGTERM or SIGINT.

    Raises:
        ConfigError: an impossible option, or the address is taken.
        FileNotFoundError, ValueError: no such target.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    _check_options(options)
    listener = _bind(options.host, options.port)
    device = torch.device(options.device or _best_device())
    target = load_target(
        options.target,
        revision=options.revision,
        gguf_file=options.gguf_file,
        dtype=options.dtype,
        device=device,
        device_map=options.device_map,
    )
    logger.info(describe_target(target))
    engine = FeatureEngine(target, Limits(options.batch_tokens, options.max_queue, options.merge_requests))
    app = create_app(engine, body_seconds=options.body_seconds, token=os.environ.get(TOKEN_VARIABLE))
    logger.info(
        "serving %s (%s, %s on %s) at http://%s:%d",
        target.name_or_path,
        target.fingerprint[:12],
        dtype_name(target.dtype),
        target.device,
        *listener.getsockname()[:2],
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=options.grace_seconds,
    )
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # uvicorn puts its own in place, and raises the signal again at the end
    try:
        with contextlib.suppress(KeyboardInterrupt):
            FeatureServer(config, engine).run(sockets=[listener])
    finally:
        engine.close()
    logger.info("stopped after %d requests of %d tokens", engine.counts.requests, engine.counts.tokens)


class FeatureServer(uvicorn.Server):
    """On a signal, what waits is refused at once, so that trainers ask another replica; what runs is finished."""

    def __init__(self, config: uvicorn.Config, engine: FeatureEngine):
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop_taking()
        await super().shutdown(sockets)


async def _read_body(request: Request, *, limit: int, seconds: float) -> bytearray:
    try:
        announced = int(request.headers["content-length"])
    except (KeyError, ValueError):
        raise Refusal(411, "send a Content-Length") from None
    if announced > limit:
        raise Refusal(413, f"the body has {announced} bytes, at most {limit} are taken (see batch_tokens)")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
    except TimeoutError:
        raise Refusal(408, f"{len(body)} of {announced} bytes came in {seconds:g} s") from None
    if not body:
        raise WireError("an empty body")
    return body


async def _result_or_disconnect(answered: Answered, request: Request) -> FeatureAnswer:
    """What the engine answers; a client that goes away takes its waiting request with it."""
    result = asyncio.wrap_future(answered)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        waited: set[asyncio.Future] = {result, gone}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            result.cancel()
            raise ClientDisconnect
        return result.result()
    finally:
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(pieces: list[memoryview]) -> AsyncIterator[memoryview]:
    for piece in pieces:
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def _has_token(request: Request, token: str) -> bool:
    return hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {token}".encode())


def _largest_body(limits: Limits) -> int:
    """Three int32 for each token: its id, a document's length and a place of a final state."""
    return 8 + MAX_HEADER + 12 * limits.batch_tokens


def _best_device() -> str:
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def _check_options(options: ServeOptions) -> None:
    if options.dtype not in CHOICES["target.dtype"]:
        raise ConfigError(f"dtype={options.dtype}: must be one of {', '.join(CHOICES['target.dtype'])}")
    if options.device_map not in (None, *CHOICES["target.device_map"]):
        raise ConfigError(f"device_map={options.device_map}: must be one of {', '.join(CHOICES['target.device_map'])}")
    for name in ("batch_tokens", "max_queue", "body_seconds", "grace_seconds"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"{name}={getattr(options, name)}: must be above 0")


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"host={host} port={port}: cannot listen there: {error}") from error


if __name__ == "__main__":
    run_command(serve, ServeOptions)
