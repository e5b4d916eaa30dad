"""From exceptions to exit codes: a user's mistake is one sentence, our own bug keeps its traceback."""

import errno
import traceback
from pathlib import Path

EXIT_USER = 2
EXIT_INTERRUPT = 130
PACKAGE_ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = "may not be read or written; change its permissions or give another path"
REFUSALS = {
    errno.ENOENT: "{} does not exist; give a path that does",
    errno.EISDIR: "{} is a folder; give a file",
    errno.ENOTDIR: "{} runs through a file that is no folder; give another path",
    errno.EACCES: f"{{}} {FORBIDDEN}",
    errno.EPERM: f"{{}} {FORBIDDEN}",
    errno.EROFS: "{} is on a read-only file system; write elsewhere with --out",
    errno.ENOSPC: "the disk is full at {}; free some space or write elsewhere with --out",
    errno.EDQUOT: "the disk quota is used up at {}; free some space or write elsewhere with --out",
    errno.EEXIST: "{} exists already; give another path",
}


class StoppedError(Exception):
    """The user stopped a run; the message says what was kept."""


def sentence_of(error: BaseException) -> str | None:
    """Return the sentence for a mistake of the user's; None for a bug of ours.

    A ValueError is the user's when a raise statement of this package threw it, rather than numpy on a shape that we
    got wrong.
    """
    if isinstance(error, OSError) and error.errno:
        where = error.filename or "the output"
        known = REFUSALS.get(error.errno)
        return known.format(where) if known else f"{error}; check the path and try again"
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, ValueError) or not frames:
        return None
    ours = Path(frames[-1].filename).resolve().is_relative_to(PACKAGE_ROOT)
    return str(error) if ours and (frames[-1].line or "").startswith("raise") else None
