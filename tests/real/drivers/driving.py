"""What every driver does: read a request, write an answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(function: Callable[..., dict[str, Any]]) -> None:
    """Call `function` with the request's entries and write what it returns."""
    asked, answered = map(Path, sys.argv[1:])
    result = function(**json.loads(asked.read_text(encoding="utf-8")))
    answered.write_text(json.dumps(result), encoding="utf-8")
