"""`python -m deepspec.publishing push checkpoint=FOLDER repo_id=NAME [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deepspec.arguments import parse_arguments
from deepspec.config import ConfigError, near_match
from deepspec.publishing.source import PublishError
from deepspec.publishing.upload import PushOptions, push

USAGE = (
    "usage: python -m deepspec.publishing push checkpoint=FOLDER repo_id=NAME [key=value ...]; push --help lists all"
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 after one message about the user's mistake."""
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if not words or words[0] != "push":
            given = f"unknown command '{words[0]}'.{near_match(words[0], ['push'])} " if words else ""
            raise ConfigError(given + USAGE)
        push(parse_arguments(PushOptions, words[1:]))
    except (ConfigError, FileNotFoundError, PublishError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
