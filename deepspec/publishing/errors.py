"""What ends a command of this package with one message."""

from __future__ import annotations


class PublishError(RuntimeError):
    """Something that cannot be published or converted. The message says what, where and what to do."""


class DamagedDraftError(PublishError):
    """Files that do not belong together or are not whole: no reader can use them."""


# What reading a config raises where a field is of another type than every reader expects.
WRONG_FIELDS = (KeyError, TypeError, AttributeError, ValueError, IndexError)


def wrong_field(error: Exception) -> str:
    """What of it to tell a user."""
    reason = (str(error).strip() or "no reason").splitlines()[-1].strip()
    return f"a field is missing or wrong ({type(error).__name__}: {reason})"
