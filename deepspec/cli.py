"""The command line: compose a typed config with Hydra, refuse what cannot work in plain words, call the library."""

from __future__ import annotations

import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepspec.arguments import USER_MISTAKES, answer_mistakes
from deepspec.config import ConfigError, EvalRun, TrainRun, near_match, validate
from deepspec.ranks import local_rank

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
Run = TypeVar("Run", bound=TrainRun | EvalRun)
ALTERNATIVES = (("train.steps", "train.epochs"), ("train.tokens_per_batch", "train.micro_batch_size"))
MISTAKES = (*USER_MISTAKES, HydraException, OmegaConfBaseException)


def run_hydra(task: Callable[[Run], Any], config_name: str, schema: type[Run]) -> None:
    """Run `task` on the config that `configs/CONFIG_NAME.yaml` and the command line compose to.

    A mistake of the user's ends the process with status 2 and one message; set HYDRA_FULL_ERROR=1 for the traceback.
    """
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)

    @hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name=config_name)
    def main(config: DictConfig) -> Any:
        with answer():
            return task(typed_run(config))

    def typed_run(config: DictConfig) -> Run:
        missing = OmegaConf.missing_keys(config)
        if missing:
            raise ConfigError(
                f"{', '.join(sorted(missing))}: must be given on the command line, for example {min(missing)}=..."
            )
        let_the_command_line_choose(config, HydraConfig.get().overrides.task)
        run: Run = typing.cast(Run, OmegaConf.to_object(config))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            run.output_dir = HydraConfig.get().runtime.output_dir
        validate(run)
        if isinstance(run, TrainRun) and not local_rank():
            _note_recipe(run, HydraConfig.get().runtime.choices.get("recipes"))
        return run

    def answer() -> AbstractContextManager[None]:
        if traceback_wanted:
            return nullcontext()
        return answer_mistakes(lambda error: explain(error, schema), MISTAKES)

    sys.argv[1:] = [let_into_dictionaries(word, schema) for word in sys.argv[1:]]
    traceback_wanted = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them
    with answer():  # what the task raises is answered inside: Hydra would add a line of its own
        main()


def let_into_dictionaries(word: str, schema: type) -> str:
    """An override of a key that holds a dictionary, or of an entry of it, in the spelling that Hydra takes for new
    entries too: `data.template_options.enable_thinking=false` needs no `+`."""
    key = word.partition("=")[0]
    free = [name for name, kind in leaf_types(schema).items() if kind.startswith("dict")]
    return f"++{word}" if "=" in word and any(f"{key}.".startswith(f"{name}.") for name in free) else word


def let_the_command_line_choose(config: DictConfig, overrides: Sequence[str]) -> None:
    """Of two keys that say the same thing in two ways, the one named on the command line counts: the other, which a
    group or recipe may have set, becomes null.

    Args:
        overrides: as they were typed.

    Raises:
        ConfigError: both were named.
    """
    named = {key for key, value in _typed_values(overrides).items() if value is not None}
    for pair in ALTERNATIVES:
        chosen = [key for key in pair if key in named]
        if len(chosen) == 2:
            raise ConfigError(f"{' and '.join(map(_override_text, pair))}: they exclude each other; give one of them")
        for other in pair:
            if chosen and other not in chosen:
                OmegaConf.update(config, other, None)


def _typed_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Values of the command line by dotted key, those of a dictionary too."""
    values: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value = None if override.is_delete() or override.is_sweep_override() else override.value()
        if isinstance(value, dict):
            values |= {f"{override.key_or_group}.{name}": inner for name, inner in value.items()}
        else:
            values[override.key_or_group] = value
    return values


def _note_recipe(run: TrainRun, recipe: str | None) -> None:
    """Another target under the default recipe gets layers, ranks and steps that were chosen for the built-in one."""
    if recipe is not None and recipe.startswith("smoke") and run.target.path != "builtin":
        logger.warning(
            "recipes=%s is made for the built-in target, and its draft.* and train.* are used for %s: any other target "
            "has recipes=dspark",
            recipe,
            run.target.path,
        )


def explain(error: Exception, schema: type) -> str:
    """A message that names the key, its value, what is allowed and a near match."""
    if isinstance(error, USER_MISTAKES):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options:
        wanted = (error.missing_cfg_file or "").rsplit("/", 1)[-1]
        known = ", ".join(error.options)
        return f"{str(error).splitlines()[0]}; available are {known}.{near_match(wanted, error.options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = (getattr(cause, "full_key", None) or "").split("[")[0]
    if not key:
        return str(error)
    types = leaf_types(schema)
    if key in types:
        brackets = f", in brackets: {key}=[...]" if types[key].startswith("list") else ""
        return f"{_override_text(key)}: {str(cause).splitlines()[0]}; {key} must be of type {types[key]}{brackets}"
    groups = {key.rsplit(".", 1)[0] for key in types if "." in key}
    near = near_match(key, types if "." in key else {name for name in {*types, *groups} if "." not in name})
    return f"unknown key '{_override_text(key)}'.{near} Add --cfg job to see every key."


def _override_text(key: str) -> str:
    """`key=value` as the user typed it, if it came from the command line; else the key."""
    typed = [argument for argument in sys.argv[1:] if argument.lstrip("+~").startswith(f"{key}=")]
    return typed[0].lstrip("+~") if typed else key


def leaf_types(schema: type, prefix: str = "") -> dict[str, str]:
    """Every key of a schema with the name of its type."""
    types: dict[str, str] = {}
    hints = typing.get_type_hints(schema)
    for entry in fields(schema):
        hint = hints[entry.name]
        if is_dataclass(hint):
            types |= leaf_types(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            types[f"{prefix}{entry.name}"] = (
                hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
            )
    return types
