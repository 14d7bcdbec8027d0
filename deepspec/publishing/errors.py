"""What ends a command of this package with one message."""

from __future__ import annotations


class PublishError(RuntimeError):
    """Something that cannot be published or converted. The message says what, where and what to do."""
