"""Run folders: everything needed to repeat a run lies in one place, and nothing half-written has a final name."""

import errno
import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__

DEFAULT_ROOT = Path("runs")
PARTIAL = ".partial"
LIBRARIES = ("numpy", "scipy", "pyarrow", "simpy", "joblib", "seaborn", "matplotlib")
PACKAGE_ROOT = Path(__file__).resolve().parent.parent


class RunFolder:
    """A folder under a temporary name until `finish`; `keep_partial` saves what is complete when a run stops early."""

    def __init__(self, root: Path, kind: str, manifest: dict[str, Any]) -> None:
        self.manifest = {"status": "running", "kind": kind, "started": _now(), **manifest}
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
        self.final, self.path = _make(root, f"{stamp}-{kind}")
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
        part = self.path / (name + ".part")
        part.write_text(text, encoding="utf-8")
        part.rename(self.path / name)

    def finish(self) -> Path:
        """Give the folder its name."""
        return self._settle("complete")

    def keep_partial(self, reason: str) -> Path | None:
        """Keep the policies that finished under a manifest that says so; None, and no folder, when none did."""
        for part in self.path.glob("*.part"):
            part.unlink(missing_ok=True)
        if not any(self.path.glob("*.parquet")):
            shutil.rmtree(self.path, ignore_errors=True)
            return None
        self.manifest["reason"] = reason
        self.manifest["finished_files"] = sorted(p.name for p in self.path.glob("*.parquet"))
        return self._settle("partial")

    def _settle(self, status: str) -> Path:
        self.manifest |= {"status": status, "finished": _now()}
        self.write_json("manifest.json", self.manifest)
        self.path.rename(self.final)
        self.path = self.final
        return self.final


def _make(root: Path, name: str) -> tuple[Path, Path]:
    root.mkdir(parents=True, exist_ok=True)
    for n in range(1, 1000):
        final = root / (name if n == 1 else f"{name}-{n}")
        temporary = final.with_name(final.name + PARTIAL)
        if final.exists():
            continue
        try:
            temporary.mkdir()
        except FileExistsError:
            continue
        return final, temporary
    raise FileExistsError(errno.EEXIST, "a thousand runs of this second exist", str(root))


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
        "command": shlex.join(["expertslice", *sys.argv[1:]]),
        "version": __version__,
        **_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    if not (PACKAGE_ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def sha256_of(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
