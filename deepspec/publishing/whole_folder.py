"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspec.publishing.errors import PublishError


@contextmanager
def written_whole(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write into; it takes its name when the block ends without an error.

    What a killed writer left behind is removed by the next one.

    Args:
        replace: whether a folder of that name is replaced; else it must not be there, or be empty.

    Raises:
        PublishError: it is there and holds something, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise PublishError(f"output_dir={folder}: is a file; choose another output_dir")
    if not replace and folder.is_dir() and any(folder.iterdir()):
        raise PublishError(f"output_dir={folder}: is not empty; remove what is there, or choose another output_dir")
    unfinished = folder.absolute().with_name(f".{folder.absolute().name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    except OSError as error:
        raise PublishError(
            f"could not write {folder}: {error}; free some space or choose another output_dir"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
