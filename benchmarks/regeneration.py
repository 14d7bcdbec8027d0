"""Tokens per second of plain sampling, as regenerating answers needs it, beside vLLM in one interleaved run.

    python -m benchmarks.regeneration target=DIR [gguf_file=NAME] [vllm_python=VENV/bin/python] [batches=1,8,32,64]

vLLM wants other versions of Transformers, so it is installed in a virtual environment of its own, whose Python is
given; without one the engine is measured alone. At each batch size all decode the same prompts at once, each to the
same number of new tokens, one after the other in each repeat; ratios are taken within a repeat. Weights of a GGUF are
handed to vLLM dequantised. The prompts are those of `python -m data_prep.corpus` unless `prompts_dir` says otherwise.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from transformers.utils import logging as transformers_logging

from benchmarks.summary import spread, summary, write_record
from deepspec.arguments import run_command
from deepspec.config import ConfigError
from deepspec.decoding import Request, SpeculativeEngine
from deepspec.evaluation.sets import load_set
from deepspec.targets import Target, load_target, load_tokenizer
from deepspec.targets.source import dtype_name, resolve_path

WORKER = Path(__file__).with_name("regeneration_vllm.py")
WARM_UP = 4  # new tokens
OURS, EAGER, COMPILED = "engine", "vLLM, eager", "vLLM, compiled"

Decode = Callable[[list[list[int]], int], float]  # prompts and new tokens of each -> seconds


@dataclass
class RegenerationOptions:
    """Plain sampling of the engine beside vLLM."""

    target: str = "???"  # model folder
    gguf_file: str | None = None
    vllm_python: str | None = None  # of an environment with vLLM; null = the engine alone
    vllm_modes: str = "eager,compiled"
    prompts_dir: str = "outputs/corpus/prompts"
    sets: str = "math,code,chat"
    longest_prompt: int = 256  # tokens; longer ones are left out
    batches: str = "1,8,32,64"
    dtypes: str = "float32,bfloat16"
    max_new_tokens: int = 200  # of each prompt, whatever its stop token
    temperature: float = 0.7
    top_p: float = 0.9
    repeats: int = 3
    output: str = "outputs/benchmarks/regeneration.json"


def prompts_of(options: RegenerationOptions, count: int) -> list[list[int]]:
    """So many prompts' token ids, of all sets in turn; from the beginning again where there are fewer."""
    tokenizer = load_tokenizer(options.target, gguf_file=options.gguf_file)
    sets = [
        [prompt.ids for prompt in load_set(name, options.prompts_dir, tokenizer)] for name in options.sets.split(",")
    ]
    short = [[ids for ids in of_set if len(ids) <= options.longest_prompt] for of_set in sets]
    if not all(short):
        raise ConfigError(f"longest_prompt={options.longest_prompt}: a set of {options.sets} has no prompt so short")
    return list(islice(cycle(chain.from_iterable(zip(*short, strict=False))), count))


def with_the_engine(options: RegenerationOptions, target: Target) -> Decode:
    def decode(prompts: list[list[int]], new_tokens: int) -> float:
        requests = [
            Request(prompt, new_tokens, options.temperature, top_p=options.top_p, seed=seed)
            for seed, prompt in enumerate(prompts)
        ]
        positions = max(map(len, prompts)) + new_tokens
        engine = SpeculativeEngine(target, slots=len(prompts), max_length=positions)
        started = time.perf_counter()
        completions = engine.generate(requests)
        seconds = time.perf_counter() - started
        assert all(len(completion.output_ids) == new_tokens for completion in completions)
        return seconds

    return decode


class Vllm:
    """vLLM in a process of its own."""

    def __init__(self, options: RegenerationOptions, model: str, dtype: str, mode: str, longest: int):
        """Raises:
        ConfigError: it does not start; with the last lines that it printed.
        """
        assert options.vllm_python is not None
        self._python = options.vllm_python
        self._sampling = {"temperature": options.temperature, "top_p": options.top_p, "ignore_eos": True}
        keywords = {
            "model": model,
            "dtype": dtype,
            "enforce_eager": mode == "eager",
            "max_model_len": longest,
            "max_num_seqs": max(sizes_of(options)),
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,  # the repeats have the same prompts
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the process
        command = [self._python, str(WORKER), json.dumps(keywords)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.started_with = self._answer()

    def decode(self, prompts: list[list[int]], new_tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": new_tokens, **self._sampling}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert answer["tokens"] == len(prompts) * new_tokens
        return answer["seconds"]

    def close(self) -> None:
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = "\n".join(self._log.read().splitlines()[-8:])
            raise ConfigError(f"vllm_python={self._python}: vLLM ended:\n{last}")
        return json.loads(line)


@contextmanager
def plain_weights(options: RegenerationOptions, target: Target) -> Iterator[str]:
    """A folder that vLLM can load; for a GGUF a temporary one."""
    if options.gguf_file is None:
        yield resolve_path(options.target)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(target.model.config)
        config.architectures = [type(target.model).__name__]
        del config.quantization_config
        config.save_pretrained(folder)
        save_model(target.model, str(Path(folder) / "model.safetensors"))
        yield folder


def measure(ways: dict[str, Decode], prompts: list[list[int]], new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each way, repeat by repeat; a short run of each goes first."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for decode in ways.values():
        decode(prompts, WARM_UP)
    for _ in range(repeats):
        for name, decode in ways.items():
            speeds[name].append(len(prompts) * new_tokens / decode(prompts, new_tokens))
    return speeds


def result_of(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Of each way its speed; of the engine also the ratios to the others."""
    result: dict[str, Any] = {name: {"tokens_per_second": summary(of_way)} for name, of_way in speeds.items()}
    result[OURS]["ratios"] = {
        name: summary([ours / theirs for ours, theirs in zip(speeds[OURS], of_way, strict=True)])
        for name, of_way in speeds.items()
        if name != OURS
    }
    return result


def sizes_of(options: RegenerationOptions) -> list[int]:
    return [int(size) for size in options.batches.split(",")]


def computes_in_bfloat16() -> bool | None:
    """Whether this CPU has instructions for it; else PyTorch emulates it, slowly. None = unknown."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def of_dtype(options: RegenerationOptions, dtype: str, prompts: list[list[int]]) -> tuple[dict[str, Any], Any]:
    """The results by batch size, and what vLLM says of itself."""
    target = load_target(options.target, gguf_file=options.gguf_file, dtype=getattr(torch, dtype))
    assert dtype_name(target.dtype) == dtype
    ways: dict[str, Decode] = {OURS: with_the_engine(options, target)}
    about = None
    with ExitStack() as stack:
        if options.vllm_python:
            model = stack.enter_context(plain_weights(options, target))
            longest = max(map(len, prompts)) + options.max_new_tokens
            for mode in options.vllm_modes.split(","):
                served = Vllm(options, model, dtype, mode, longest)
                stack.callback(served.close)
                ways[EAGER if mode == "eager" else COMPILED] = served.decode
                about = served.started_with
        return {
            str(size): result_of(measure(ways, prompts[:size], options.max_new_tokens, options.repeats))
            for size in sizes_of(options)
        }, about


def table_of(results: dict[str, Any]) -> Table:
    table = Table()
    for column in ("dtype", "batch", "decoded with", "tokens/s", "engine / this"):
        table.add_column(column, no_wrap=True)
    for dtype, by_size in results.items():
        for size, by_way in by_size.items():
            for name, of_way in by_way.items():
                ratio = by_way[OURS]["ratios"].get(name)
                speed = spread(of_way["tokens_per_second"], 1)
                table.add_row(dtype, size, name, speed, spread(ratio, 2) if ratio else "")
    return table


def main(options: RegenerationOptions) -> None:
    transformers_logging.set_verbosity_error()
    modes = options.vllm_modes.split(",")
    if not set(modes) <= {"eager", "compiled"}:
        raise ConfigError(f"vllm_modes={options.vllm_modes}: must be eager, compiled, or eager,compiled")
    native = computes_in_bfloat16()
    if native is False and "bfloat16" in options.dtypes:
        print("This CPU has no bfloat16 instructions: PyTorch emulates it, and float32 is the fair comparison.")
    prompts = prompts_of(options, max(sizes_of(options)))
    results, vllm = {}, None
    for dtype in options.dtypes.split(","):
        results[dtype], vllm = of_dtype(options, dtype, prompts)
    Console(width=max(Console().width, 100)).print(table_of(results))
    lengths = [len(prompt) for prompt in prompts]
    write_record(options.output, results, options, vllm=vllm, prompt_lengths=lengths, native_bfloat16=native)


if __name__ == "__main__":
    run_command(main, RegenerationOptions)
