"""Runs a Python program in this process and records the first model with experts that runs in it; needs torch."""

import runpy
import sys
import traceback
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..runtime.recorder import Recorder
from .errors import StoppedError


def record_command(command: Sequence[str], out: Path, *, name: str | None, times: bool, flush_s: float) -> Recorder:
    """Run a program and record its model to `out`; return the recorder, closed.

    Raises:
        ValueError: the command is no Python program, it failed, or no model with experts ran in it.
        StoppedError: the user stopped it; what was recorded is kept.
    """
    check_command(command)
    recorder = Recorder(out, name=name, times=times, flush_s=flush_s)
    failed: BaseException | None = None
    try:
        with first_model(recorder):
            run_program(command)
    except SystemExit as stop:
        failed = stop if stop.code else None
    except BaseException as error:  # the program's own mistakes, Ctrl-C included
        failed = error
    recorder.close(notes=None if failed is None else f"partial: the program broke off ({type(failed).__name__})")
    if failed is None:
        if not recorder.num_steps:
            raise ValueError(f"no model with experts ran in {' '.join(command)}; nothing was written")
        return recorder
    kept = f"the {recorder.num_steps} steps until then are kept in {out}, marked partial"
    kept = kept if recorder.num_steps else "nothing was recorded"
    if isinstance(failed, KeyboardInterrupt):
        raise StoppedError(f"stopped; {kept}")
    if not isinstance(failed, SystemExit):
        traceback.print_exception(failed)
    raise ValueError(f"the program failed ({type(failed).__name__}: {failed}); {kept}") from failed


def check_command(command: Sequence[str]) -> None:
    """Raise ValueError unless the command is a Python program."""
    python, *rest = command
    if not Path(python).name.startswith("python") or not rest or (rest[0].startswith("-") and rest[0] != "-m"):
        raise ValueError(
            f"record cannot run {' '.join(command)!r}; write -- python script.py ..., or -- python -m module ..."
        )
    if rest[0] == "-m" and len(rest) < 2:
        raise ValueError("record: -m names no module; write -- python -m module ...")
    if rest[0] != "-m" and not Path(rest[0]).is_file():
        raise ValueError(f"script {rest[0]} does not exist; give the path of a Python script")


def run_program(command: Sequence[str]) -> None:
    """Run a Python program as the interpreter would, in this process."""
    _, *rest = command
    before = sys.argv, sys.path[:]
    try:
        if rest[0] == "-m":
            sys.argv = rest[1:]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = rest
            sys.path.insert(0, str(Path(rest[0]).resolve().parent))
            runpy.run_path(rest[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


@contextmanager
def first_model(recorder: Recorder) -> Generator[None]:
    """Attach a recorder to the outermost module with experts that is called first; then calls cost nothing more."""
    call, seen = nn.Module.__call__, weakref.WeakSet[nn.Module]()

    def looking(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if nn.Module.__call__ is looking and module not in seen:
            seen.add(module)
            if any(type(one).__name__.endswith("Experts") or hasattr(one, "on_ids") for one in module.modules()):
                nn.Module.__call__ = call
                try:
                    recorder.attach(module)
                except ValueError as error:
                    recorder.stop(str(error))
        return call(module, *args, **kwargs)

    nn.Module.__call__ = looking
    try:
        yield
    finally:
        nn.Module.__call__ = call
