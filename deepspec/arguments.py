"""`key=value` arguments into a dataclass, for the small commands that need no Hydra."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepspec.checkpoints import CheckpointError
from deepspec.config import ConfigError, near_match
from deepspec.data.jsonl import DataError
from deepspec.ranks import LostRankError

Options = TypeVar("Options")
# What a command answers with its message alone, without a traceback: the message says what to do.
USER_MISTAKES = (ConfigError, DataError, CheckpointError, FileNotFoundError, LostRankError)


def parse_arguments(schema: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """Read `key=value` words (default: the command line) into `schema`; `--help` prints its keys and exits.

    Raises:
        ConfigError: an unknown key, a wrong type, or a key without a value that has no default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    assert is_dataclass(schema)
    names = [entry.name for entry in fields(schema)]
    if {"-h", "--help"} & set(words):
        print(
            (schema.__doc__ or "").strip()
            + "\n\nkey=value, with the defaults:\n"
            + OmegaConf.to_yaml(OmegaConf.structured(schema))
        )
        sys.exit(0)
    for word in words:
        key = word.split("=", 1)[0]
        if "=" not in word:
            raise ConfigError(f"'{word}': expected key=value")
        if key not in names:
            raise ConfigError(f"unknown key '{key}'; the keys are {', '.join(names)}.{near_match(key, names)}")
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(words))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise ConfigError(f"{', '.join(sorted(missing))}: must be given as key=value")
    return cast(Options, OmegaConf.to_object(config))


def run_command(task: Any, schema: type[Options]) -> None:
    """Parse the command line, run `task` on the options; a user's mistake ends with status 2 and one message."""
    try:
        task(parse_arguments(schema))
    except USER_MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
