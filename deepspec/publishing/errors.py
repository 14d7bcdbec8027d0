"""What ends a command of this package with one message."""

from __future__ import annotations


class PublishError(RuntimeError):
    """Something that cannot be published or converted. The message says what, where and what to do."""


class DamagedDraftError(PublishError):
    """Files that do not belong together or are not whole: no reader can use them."""
