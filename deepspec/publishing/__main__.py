"""`python -m deepspec.publishing COMMAND [key=value ...]`: push, export, import, check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from deepspec.arguments import USER_MISTAKES, parse_arguments
from deepspec.config import ConfigError, near_match
from deepspec.publishing.check import CheckOptions, check
from deepspec.publishing.convert import ExportOptions, ImportOptions, export_draft, import_draft
from deepspec.publishing.errors import PublishError
from deepspec.publishing.upload import PushOptions, push

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], Any], str]] = {
    "push": (PushOptions, push, "upload a draft with a model card: checkpoint=FOLDER repo_id=NAME"),
    "export": (
        ExportOptions,
        export_draft,
        "write it in another layout: checkpoint=FOLDER format=NAME output_dir=FOLDER",
    ),
    "import": (ImportOptions, import_draft, "read another layout: path=FOLDER output_dir=FOLDER [target=NAME]"),
    "check": (CheckOptions, check, "what engines would do with a folder: path=FOLDER [engine=NAME]"),
}
USAGE = "usage: python -m deepspec.publishing COMMAND [key=value ...]; COMMAND --help lists the keys\n" + "\n".join(
    f"  {name:<7} {text}" for name, (_, _, text) in COMMANDS.items()
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, that of `check`, or 2 after one message about the user's mistake."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(
                f"unknown command '{words[0]}': must be one of {', '.join(COMMANDS)}.{near_match(words[0], COMMANDS)}"
            )
        options, run, _ = COMMANDS[words[0]]
        result = run(parse_arguments(options, words[1:]))
    except (PublishError, *USER_MISTAKES) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
