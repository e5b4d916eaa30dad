"""Run the product where torch, triton and pynvml cannot be imported: a script for environments without them."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

BARRED = ("torch", "triton", "pynvml", "cuda")
FREE = ("traces", "policies", "sim", "experiments")
ALLOWED_TO_NEED_TORCH = tuple(
    f"expertslice.experiments.{name}"
    for name in (
        "own_model",
        "compile_tiles",
        "bench_routing",
        "tune",
        "tune_shape",
        "record_program",
        "bench_generate",
        "record_library",
    )
)


def main() -> None:
    """Import every module that must stand without torch, then rank policies on the bundled trace."""
    installed = [name for name in BARRED if importlib.util.find_spec(name)]
    if installed:
        sys.exit(f"this check needs an environment without {', '.join(installed)}; use the one of `make run`")
    for package in FREE:
        folder = importlib.import_module(f"expertslice.{package}")
        for module in pkgutil.walk_packages(folder.__path__, f"expertslice.{package}."):
            if not module.name.startswith(ALLOWED_TO_NEED_TORCH):
                importlib.import_module(module.name)
    command = [str(Path(sys.executable).with_name("expertslice")), "whatif", "--steps", "24", "--no-report", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    sys.stdout.write("no torch: all modules import and what-if runs\n")


if __name__ == "__main__":
    main()
