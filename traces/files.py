"""Files that stand whole or not at all."""

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from .check import TraceError, first_line


@contextmanager
def atomic(path: Path) -> Generator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`, else removed.

    Raises:
        TraceError: The system refused to write: a full disk, a missing or unwritable folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        why = error.strerror or first_line(error)
        raise TraceError(f"cannot write {path}: {why}; free space there or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the device."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
