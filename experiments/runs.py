"""Run folders: everything needed to repeat a run lies in one place, and nothing half-written has a final name."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import PACKAGE_ROOT

LIBRARIES = ("numpy", "scipy", "pyarrow", "simpy", "joblib", "seaborn", "matplotlib")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name that readers pass over; what is written there gets its own in the end, or is dropped."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class RunFolder:
    """A folder under a temporary name until `finish`; `keep_partial` saves what is complete when a run stops early."""

    def __init__(self, root: Path, kind: str, manifest: dict[str, Any]) -> None:
        self.manifest = {"status": "running", "kind": kind, "started": _now(), **manifest}
        self.final, self.path = _make(root, f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{kind}")
        try:
            self.write_json("manifest.json", self.manifest)
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file, complete or not at all."""
        self.write_text(name, to_json(value) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, complete or not at all."""
        with whole(self.path / name) as part:
            part.write_text(text, encoding="utf-8")

    def finish(self, status: str = "complete") -> Path:
        """Give the folder its name."""
        self.manifest |= {"status": status, "finished": _now()}
        self.write_json("manifest.json", self.manifest)
        self.path.rename(self.final)
        self.path = self.final
        return self.final

    def keep_partial(self, reason: str) -> Path | None:
        """Keep the policies that finished under a manifest that says so; None, and no folder, when none did."""
        for part in self.path.glob("*.part"):
            part.unlink(missing_ok=True)
        finished = sorted(p.name for p in self.path.glob("*.parquet"))
        if not finished:
            shutil.rmtree(self.path, ignore_errors=True)
            return None
        self.manifest |= {"reason": reason, "finished_files": finished}
        return self.finish("partial")


def _make(root: Path, name: str) -> tuple[Path, Path]:
    """Make a folder under a temporary name whose final name is free; return both, the final one first."""
    root.mkdir(parents=True, exist_ok=True)
    for final in (root / name, *(root / f"{name}-{n}" for n in range(2, 1000))):
        temporary = final.with_name(final.name + ".partial")
        # Another run may make the same folder at the same moment.
        with contextlib.suppress(FileExistsError):
            if not final.exists():
                temporary.mkdir()
                return final, temporary
    raise FileExistsError(errno.EEXIST, "a thousand runs of this second exist", str(root))


def file_name(name: str) -> str:
    """Return a policy's name as a file may have it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(value: object, *, indent: int | None = 2) -> str:
    """Return valid JSON: NaN and infinity become null, arrays and paths what they hold."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def provenance() -> dict[str, Any]:
    """Return the command and the software behind a run."""
    return {
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "version": __version__,
        **_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _program() -> list[str]:
    """Return how this program was called: as the command line, or as one of our modules."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec else ""
    return ["python", "-m", name] if name.startswith("expertslice.") else ["expertslice"]


def _version(library: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(library)


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE_ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    if (PACKAGE_ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    return {"commit": None, "dirty": None}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
