"""Files that appear complete."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["is_writable", "replaced"]


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, which replaces an existing file only when it is complete.

    Raises:
        OSError: if the file cannot be written. An existing file then keeps its content.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replaced(Path(folder) / "map.txt") as file:
        ...         count = file.write(b"0.1")
        ...     (Path(folder) / "map.txt").read_text()
        '0.1'
    """
    target = Path(os.path.realpath(path))  # keep symbolic links
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not is_writable(target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    part = target.with_name(f".{uuid.uuid4().hex}.part")  # another process may write the same file
    try:
        with part.open("xb") as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def is_writable(path: Path) -> bool:
    """Whether this process may write to a file or a folder."""
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
