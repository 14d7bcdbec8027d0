"""`key=value` arguments into a dataclass for the small commands, and how a mistake ends any command."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeVar, cast

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deepspec.checkpoints import CheckpointError
from deepspec.config import ConfigError, near_match
from deepspec.data.jsonl import DataError
from deepspec.ranks import LostRankError, launched_ranks, local_rank, tells_of_lost_rank
from deepspec.training.finite import NotFiniteError

Options = TypeVar("Options")
# What a command answers with its message alone, without a traceback: the message says what to do.
USER_MISTAKES = (
    *(ConfigError, DataError, CheckpointError, LostRankError, NotFiniteError),
    *(FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError),  # of folders that cannot be made
)
# Seconds. When one rank ends, the launcher ends the others within a tenth of a second: who waits lets another speak.
WAIT_FOR_FIRST_RANK, WAIT_FOR_LOST_RANK = 3.0, 10.0


@contextmanager
def answer_mistakes(
    explain: Callable[[Exception], str] = str, mistakes: tuple[type[Exception], ...] = USER_MISTAKES
) -> Iterator[None]:
    """Within the block a user's mistake ends the process with status 2 and its message alone, without a traceback.

    Of several ranks that one speaks which knows most: the first of those that made the mistake, and only if there is
    none, one of those that lost another rank.

    Args:
        explain: the message of a mistake.
        mistakes: what counts as one.
    """
    try:
        yield
    except mistakes as error:
        if isinstance(error, LostRankError):
            _end(explain(error), wait=WAIT_FOR_LOST_RANK)
        _end(explain(error), wait=WAIT_FOR_FIRST_RANK if local_rank() else 0.0)
    except RuntimeError as error:
        if launched_ranks() == 1 or not tells_of_lost_rank(error):
            raise
        _end(f"another rank ended or no longer answers; its own output says why ({error})", wait=WAIT_FOR_LOST_RANK)


def _end(message: str, wait: float) -> NoReturn:
    """Say it, also in the table that PyTorch's launcher prints last, and end with status 2."""
    if launched_ranks() > 1:
        time.sleep(wait)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(file, "w", encoding="utf-8") as report:
            json.dump({"message": f"error: {message}", "timestamp": int(time.time())}, report)
    sys.exit(2)


def parse_arguments(schema: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """Read `key=value` words (default: the command line) into `schema`; `--help` prints its keys and exits.

    Lists and dictionaries are written as in YAML, special characters in quotes: `key=[a,'*.b']`, `key={a: 1}`.

    Raises:
        ConfigError: an unknown key, a wrong type, or a key without a value that has no default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    assert is_dataclass(schema)
    names = [entry.name for entry in fields(schema)]
    defaults = OmegaConf.structured(schema)
    if {"-h", "--help"} & set(words):
        print((schema.__doc__ or "").strip() + "\n\nkey=value, with the defaults:\n" + OmegaConf.to_yaml(defaults))
        sys.exit(0)
    for word in words:
        key = word.split("=", 1)[0]
        if "=" not in word:
            raise ConfigError(f"'{word}': expected key=value")
        if key not in names:
            raise ConfigError(f"unknown key '{key}'; the keys are {', '.join(names)}.{near_match(key, names)}")
        if isinstance(defaults.get(key), ListConfig) and not word.split("=", 1)[1].startswith("["):
            raise ConfigError(f"{word}: expected a list; write {key}=[{word.split('=', 1)[1]}]")
    try:
        config = OmegaConf.merge(defaults, OmegaConf.from_dotlist(words))
    except YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{' '.join(words)}: cannot be read ({reason}); put what has special characters in quotes, as in "
            "\"key=['*.jsonl',b]\""
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise ConfigError(f"{', '.join(sorted(missing))}: must be given as key=value")
    return cast(Options, OmegaConf.to_object(config))


def run_command(task: Any, schema: type[Options]) -> None:
    """Parse the command line, run `task` on the options; a user's mistake ends with status 2 and one message."""
    with answer_mistakes():
        task(parse_arguments(schema))
