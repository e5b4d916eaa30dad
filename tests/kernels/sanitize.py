"""Run the compute sanitizer over GPU tests of each kernel, and write what it says: needs a GPU and CUDA's tools.

python tests/kernels/sanitize.py > docs/results/kernels/sanitizers.json
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROUTING = "softmax-64 or softmax-65 or groups-64 or groups-1000"
RUNS = [
    ("memcheck", "all", f"{ROUTING} or fused or widths or streams or grids"),
    ("memcheck", "pingpong_kernel", "gathered and swiglu and bf16"),
    ("synccheck", "all", "softmax-64 or softmax-65 or fused"),
    ("racecheck", "route_kernel", ROUTING),
    ("racecheck", "place_kernel", "softmax-65 or groups-1000"),
    ("racecheck", "gather_kernel", "gathered and swiglu and bf16"),
    ("racecheck", "combine_kernel", "neighbours"),
    ("racecheck", "grouped_kernel (fp32)", "fp32_has"),
    ("racecheck", "grouped_kernel", "widths or streams"),
    ("racecheck", "fused_kernel", "fused"),
]


def run(tool, kernels, tests):
    kernel = "kns=_kernel" if kernels == "all" else f"kne={kernels.split()[0]}"
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--kernel-name",
        kernel,
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
    ]
    command += [str(Path(__file__).with_name("test_gpu.py")), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run([*command, "-k", tests], capture_output=True, text=True, timeout=300, check=False)
    return {"tool": tool, "kernels": kernels, **read(done.stdout)}


def read(log):
    """Return how many tests passed under a tool, and its verdict."""
    passed = re.search(r"(\d+) passed", log)
    summary = re.search(r"SUMMARY: (.+)", log)
    if "Internal Sanitizer Error" in log or summary is None:
        return {"tests": None, "result": "tool failed"}
    failed = re.search(r"(\d+) failed", log)
    verdict = summary[1] + (f"; {failed[1]} tests failed" if failed else "")
    return {"tests": int(passed[1]) if passed else 0, "result": verdict}


if __name__ == "__main__":
    # Tools share the device: what they look for does not depend on time.
    with ThreadPoolExecutor() as pool:
        json.dump(list(pool.map(lambda one: run(*one), RUNS)), sys.stdout, indent=1)
