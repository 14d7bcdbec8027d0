"""What a target is read from: the name that a user gives, and the config and tokenizer that lie there.

Whatever cannot be read is answered with one line that names it, instead of a library's traceback.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from deepspec.config import ConfigError
from deepspec.targets.adapters import adapter_for

BUILTIN_WEIGHTS = Path(__file__).with_name("builtin_weights")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Endings of architectures that have no head over the vocabulary, or one that fills in masks.
OTHER_TASKS = ("ForMaskedLM", "Classification", "QuestionAnswering", "ForPreTraining", "ForMultipleChoice")


def resolve_path(path: str, gguf_file: str | None = None) -> str:
    """`builtin` -> the folder of the built-in target's weights; anything else is returned as it is.

    Raises:
        ConfigError: it is a GGUF file, which `target.gguf_file` has to name.
        FileNotFoundError: it looks like a folder (or is the built-in target) and holds no model.
    """
    resolved = str(BUILTIN_WEIGHTS) if path == "builtin" else path
    place = Path(resolved).expanduser()
    if place.suffix == ".gguf":
        raise ConfigError(
            f"target.path={path}: a GGUF file is named by its folder and its name: target.path={place.parent} "
            f"target.gguf_file={place.name}"
        )
    if not (path == "builtin" or place.exists() or path.startswith(("/", "./", "../", "~"))):
        return resolved
    if not (place / (gguf_file or "config.json")).is_file():
        raise FileNotFoundError(_explain_absence(path, place, gguf_file))
    return str(place)


def _explain_absence(path: str, place: Path, gguf_file: str | None) -> str:
    if not place.is_dir():
        missing = f"target.path={path}: no such folder"
    elif gguf_file is not None:
        missing = f"target.gguf_file={gguf_file}: no such file in {place}"
    else:
        missing = f"target.path={path}: no config.json in {place}"
    files = sorted(file.name for file in place.glob("*.gguf"))
    if files:
        return f"{missing}; GGUF files there, to be named with target.gguf_file: {', '.join(files[:5])}"
    return f"{missing}; give a folder with a saved Hugging Face model, a Hub id, or 'builtin'"


def shown_name(path: str, gguf_file: str | None = None) -> str:
    """How a message calls a target."""
    return f"{path}/{gguf_file}" if gguf_file else path


def read_config(path: str, revision: str | None = None, gguf_file: str | None = None) -> PreTrainedConfig:
    """The config as Transformers reads it; of a GGUF file, its metadata.

    Raises:
        ConfigError: it is damaged, of a model type that Transformers does not know, or no causal language model.
        FileNotFoundError: no such folder, file or Hub repository.
    """
    resolved = resolve_path(path, gguf_file)
    check_gguf(gguf_file)
    with _explained(path, revision, gguf_file):
        if gguf_file is None:
            config = AutoConfig.from_pretrained(resolved, revision=revision, trust_remote_code=False)
        else:
            config = copy.deepcopy(_gguf_config(resolved, revision, gguf_file))
    model_class(config, path)  # or refuse
    return config


@lru_cache(maxsize=4)
def _gguf_config(resolved: str, revision: str | None, gguf_file: str) -> PreTrainedConfig:
    """Kept, because reading a GGUF file's metadata takes seconds and every part of a run asks for it."""
    return AutoConfig.from_pretrained(resolved, revision=revision, gguf_file=gguf_file)


def check_gguf(gguf_file: str | None) -> None:
    """Raises ConfigError where a GGUF file is asked for and the package that reads it is missing."""
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ConfigError(f'target.gguf_file={gguf_file}: needs the gguf package: pip install "deepspec[gguf]"')


def model_class(config: PreTrainedConfig, path: str) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Transformers' loader of this target. Vision-language models that are no causal language models by themselves are
    loaded whole, and only the language model inside is used.

    Raises:
        ConfigError: it is no language model that predicts the next token.
    """
    architectures = getattr(config, "architectures", None) or []
    is_other = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", None) is False
    if architectures:
        is_other = getattr(config, "is_encoder_decoder", False) or architectures[0].endswith(OTHER_TASKS)
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if not is_other and type(config) in loader._model_mapping:
            return loader
    what = f" ({architectures[0]})" if architectures else ""
    raise ConfigError(
        f"target.path={path}: model type '{config.model_type}'{what} is not a causal language model; give one that "
        "predicts the next token"
    )


def load_target_config(path: str, revision: str | None = None, gguf_file: str | None = None) -> PreTrainedConfig:
    """The target's (text) config, without its weights.

    Raises:
        ConfigError, FileNotFoundError: see `read_config`.
    """
    config = read_config(path, revision, gguf_file)
    return adapter_for(config).text_config(config)


def load_tokenizer(
    path: str, *, revision: str | None = None, gguf_file: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The target's tokenizer; `chat_template` names a Jinja file that replaces its own template.

    Raises:
        ConfigError: there is no tokenizer beside the model, or it is damaged.
        FileNotFoundError: no such target, or the template file does not exist.
    """
    resolved = resolve_path(path, gguf_file)
    check_gguf(gguf_file)
    named = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved, revision=revision, trust_remote_code=False, **named)
    except Exception as error:  # tokenizers are read by many classes and libraries, each with errors of its own
        _refuse_hub(path, revision, error)
        raise ConfigError(f"target.path={path}: {_no_tokenizer(error)}") from error
    if not tokenizer.encode("a b", add_special_tokens=False) or tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        raise ConfigError(f"target.path={path}: {_no_tokenizer(None)}")
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise FileNotFoundError(f"data.chat_template={chat_template}: no such file")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.chat_template={chat_template}: not UTF-8 ({error}); convert the file") from error
    return tokenizer


def _no_tokenizer(error: Exception | None) -> str:
    known = error is not None and not first_line(error).endswith(":")  # a heading of Transformers' own advice
    reason = f" ({first_line(error)})" if error is not None and known else ""
    return (
        f"its tokenizer cannot be read{reason}; save it there with the model's own tokenizer.save_pretrained, "
        "tokenizer.json and tokenizer_config.json"
    )


def resolve_dtype(name: str, path: str, *, revision: str | None = None, gguf_file: str | None = None) -> torch.dtype:
    """The dtype that `target.dtype` names, the one place where it is read.

    `auto` is the dtype that the checkpoint's config.json records, and bfloat16 where it records none that can be
    computed in, which includes quantised GGUF files; float32 for the built-in target, stored in half for its size only.

    Raises:
        ConfigError: no such dtype.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"target.dtype={name}: must be one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if path == "builtin":
        return torch.float32
    config = read_config(path, revision, gguf_file)
    recorded = config.get_text_config().dtype or config.dtype
    return recorded if isinstance(recorded, torch.dtype) and recorded in DTYPES.values() else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bfloat16"""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException, length: int = 300) -> str:
    """Of an error's message, as long as a reader follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]


@contextmanager
def _explained(path: str, revision: str | None, gguf_file: str | None) -> Iterator[None]:
    """Errors of reading a config, as one line."""
    try:
        yield
    except Exception as error:  # Transformers raises what its parsers raise
        _refuse_hub(path, revision, error)
        raise ConfigError(_explain_config(path, gguf_file, error)) from error


def _explain_config(path: str, gguf_file: str | None, error: Exception) -> str:
    if gguf_file is not None:
        return (
            f"target.gguf_file={gguf_file}: cannot be read ({first_line(error)}); copy or download it again, or use "
            f"the safetensors of the model if Transformers {transformers.__version__} does not read this kind"
        )
    file = Path(resolve_path(path)) / "config.json"
    where = str(file) if file.is_file() else f"target.path={path}"
    stored: Any = None
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as damage:
            return f"{file}: not readable JSON ({first_line(damage)}); copy or download it again"
        if not isinstance(stored, dict) or "model_type" not in stored:
            return f"{file}: has no model_type, so it is not the config.json of a Hugging Face model"
        if stored["model_type"] in CONFIG_MAPPING_NAMES:
            return f"{file}: {first_line(error)}{_second_line(error)}"
        if "auto_map" in stored:
            return (
                f"{file}: model type '{stored['model_type']}' brings its own code, which is not run here; models that "
                f"Transformers {transformers.__version__} has built in can be targets"
            )
    if "model type" in str(error) or stored is not None:
        named = f" '{stored['model_type']}'" if stored else ""
        return (
            f"{where}: Transformers {transformers.__version__} does not know the model type{named}; if it is newer, "
            "pip install --upgrade transformers"
        )
    return f"{where}: {first_line(error)}"


def _second_line(error: Exception) -> str:
    """Validation errors name the field in their first line and what is wrong with it in the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f" {lines[1]}" if isinstance(error, StrictDataclassError) and len(lines) > 1 else ""


def _refuse_hub(path: str, revision: str | None, error: Exception) -> None:
    """Raises FileNotFoundError where a Hub id is wrong or cannot be reached."""
    if Path(resolve_path(path) if path == "builtin" else path).expanduser().exists() or not isinstance(error, OSError):
        return
    cause = error.__cause__
    if isinstance(cause, HFValidationError):
        reason = "a Hub id reads owner/name"
    elif isinstance(cause, RepositoryNotFoundError):
        reason = "the Hub has no such repository, or it is private and needs `hf auth login`"
    else:
        reason = f"{first_line(error)} Check the id and the network"
    raise FileNotFoundError(
        f"target.path={path}: no such folder, and it could not be fetched from the Hub"
        f"{f' at revision {revision}' if revision else ''}: {reason}"
    ) from error
