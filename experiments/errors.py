"""From exceptions to exit codes: a user's mistake is one sentence, our own bug keeps its traceback."""

import errno
import linecache
from pathlib import Path
from types import TracebackType

EXIT_USER = 2
EXIT_INTERRUPT = 130
PACKAGE_ROOT = Path(__file__).resolve().parent.parent


class StoppedError(Exception):
    """The user stopped a run; the message says what was kept."""


def sentence_of(error: BaseException) -> str | None:
    """Return the sentence for a mistake of the user's; None for a bug of ours."""
    if isinstance(error, OSError):
        return _os_sentence(error)
    if isinstance(error, ValueError) and _raised_on_purpose(error.__traceback__):
        return str(error)
    return None


def _raised_on_purpose(traceback: TracebackType | None) -> bool:
    """Return whether a raise statement of this package threw it, rather than numpy on a shape that we got wrong."""
    if traceback is None:
        return False
    while traceback.tb_next:
        traceback = traceback.tb_next
    path = Path(traceback.tb_frame.f_code.co_filename).resolve()
    line = linecache.getline(str(path), traceback.tb_lineno)
    return path.is_relative_to(PACKAGE_ROOT) and line.strip().startswith("raise")


def _os_sentence(error: OSError) -> str | None:
    where = error.filename or "the output"
    known = {
        errno.ENOENT: f"{where} does not exist; give a path that does",
        errno.EISDIR: f"{where} is a folder; give a file",
        errno.ENOTDIR: f"{where} runs through a file that is no folder; give another path",
        errno.EACCES: f"{where} may not be read or written; change its permissions or give another path",
        errno.EPERM: f"{where} may not be read or written; change its permissions or give another path",
        errno.EROFS: f"{where} is on a read-only file system; write elsewhere with --out",
        errno.ENOSPC: f"the disk is full at {where}; free some space or write elsewhere with --out",
        errno.EDQUOT: f"the disk quota is used up at {where}; free some space or write elsewhere with --out",
        errno.EEXIST: f"{where} exists already; give another path",
    }
    if error.errno in known:
        return known[error.errno]
    return f"{error}; check the path and try again" if error.errno else None
