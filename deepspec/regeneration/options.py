"""Keys that the commands in which the target writes have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from deepspec.config import ConfigError, near_match
from deepspec.decoding import Request
from deepspec.regeneration.writer import Sampling


@dataclass
class TargetOptions:
    path: str = MISSING  # "builtin", a folder, or a Hub id; with urls only its config and tokenizer are read
    revision: str | None = None  # Hub branch, tag or commit
    gguf_file: str | None = None  # name of a GGUF file there
    dtype: str = "auto"  # auto (the checkpoint's own), float32, bfloat16, float16


@dataclass
class WritingOptions:
    """Who writes, and how."""

    target: TargetOptions = field(default_factory=TargetOptions)
    output_dir: str = MISSING
    draft: str | None = None  # in this process: a draft that makes it faster, and changes nothing else
    batch_size: int = 16  # in this process: rows decoded together
    urls: list[str] = field(default_factory=list)  # servers with the OpenAI API instead, as http://host:port
    model: str | None = None  # the target's name there; null = ask /v1/models
    concurrency: int = 64  # requests under way on each server
    timeout: float = 600.0  # seconds for one request
    retries: int = 4  # a row that servers fail at so often is left for the next run
    retry_for: float = 300.0  # seconds without any server that answers before the run ends
    temperature: float = 0.7  # 0 = greedy
    top_p: float = 0.8  # 1 = off
    top_k: int = 20  # 0 = off
    min_p: float = 0.0  # 0 = off
    max_new_tokens: int = 2048  # of one turn
    max_length: int | None = None  # positions of prompt and answer; null = the target's or server's, here at most 4096
    seed: int = 0
    chat_template: str | None = None  # a Jinja file in place of the tokenizer's own template
    template_options: dict[str, Any] = field(default_factory=dict)  # passed to it, e.g. {enable_thinking: false}

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.max_new_tokens)


def check_options(options: WritingOptions) -> None:
    """Raises ConfigError for values that cannot work."""
    sampling = options.sampling
    try:
        Request([0], sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for name, least in (("batch_size", 1), ("concurrency", 1), ("retries", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"{name}={getattr(options, name)}: must be at least {least}")
    for name in ("timeout", "retry_for"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"{name}={getattr(options, name)}: must be above 0 seconds")
    if options.max_length is not None and options.max_length < 2:
        raise ConfigError(f"max_length={options.max_length}: must be at least 2: a prompt and an answer")
    if bad := [url for url in options.urls if not url.startswith(("http://", "https://"))]:
        raise ConfigError(f"urls: {bad[0]}: must begin with http:// or https://, for example http://localhost:8000")
    if options.urls and options.draft:
        raise ConfigError("draft: a server has its own; give it to the server, or leave urls out")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError where it is none of them."""
    if value not in allowed:
        raise ConfigError(f"{name}={value}: must be one of {', '.join(allowed)}.{near_match(value, allowed)}")
