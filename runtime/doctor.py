"""What this machine can do for slicing, and what to do about what it cannot. It reads, and changes nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DRIVER_PARAMETERS = Path("/proc/driver/nvidia/params")
LIBRARIES = {
    "torch": "runtime and kernels need it: install expertslice[gpu]",
    "triton": "kernels need it: install expertslice[gpu]",
    "nvidia-ml-py": "energy, clocks and this page need it: install expertslice[gpu]",
    "cuda-bindings": "green contexts need it: install expertslice[gpu]",
}
GREEN_CONTEXTS_CUDA = 12_040
"""The first CUDA version, as NVML counts them, whose driver splits SMs for green contexts."""
LEAST_CAPABILITY, HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; advice where something is amiss."""

    subject: str
    found: str
    advice: str | None = None


def examine(
    *, nvml: Any = None, libraries: Mapping[str, str | None] | None = None, parameters: Path = DRIVER_PARAMETERS
) -> list[Finding]:
    """Return what was found: libraries, driver, then each GPU.

    Args:
        nvml: stands for pynvml.
        libraries: their versions, None for one that is missing; default: those installed.
        parameters: the driver's file of module parameters.
    """
    held = {name: installed(name) for name in LIBRARIES} if libraries is None else libraries
    found = [
        Finding(subject=name, found=held.get(name) or "missing", advice=None if held.get(name) else advice)
        for name, advice in LIBRARIES.items()
    ]
    if nvml is None:
        try:
            import pynvml as nvml
        except ImportError:
            return found
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        advice = "simulation and what-if work without a GPU; on a machine with one, see whether nvidia-smi runs"
        return [*found, Finding(subject="driver", found=f"none ({error})", advice=advice)]
    try:
        return [*found, *_of_driver(nvml), *_of_counters(parameters), *_of_devices(nvml)]
    finally:
        nvml.nvmlShutdown()


@cache
def installed(name: str) -> str | None:
    """Return the version of a distribution; None: it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ask(nvml: Any, name: str, *args: Any) -> Any:
    """Return what NVML answers; None where it, the driver or the device cannot."""
    try:
        return getattr(nvml, name)(*args)
    except (nvml.NVMLError, AttributeError):
        return None


def _whether(subject: str, told: bool, advice: str, *, yes: str = "readable", no: str = "not there") -> Finding:
    return Finding(subject=subject, found=yes if told else no, advice=None if told else advice)


def _of_driver(nvml: Any) -> Iterator[Finding]:
    cuda = _ask(nvml, "nvmlSystemGetCudaDriverVersion") or 0
    name = f"{_ask(nvml, 'nvmlSystemGetDriverVersion')}, CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    yield Finding(subject="driver", found=name)
    advice = "green_context slices need a driver of CUDA 12.4 or newer; shared and sm_budget work"
    new = cuda >= GREEN_CONTEXTS_CUDA
    yield _whether("green contexts", new, advice, yes="in this driver", no="not in this driver")


def _of_counters(parameters: Path) -> Iterator[Finding]:
    """Say whether everybody may read hardware counters with a profiler."""
    try:
        text = parameters.read_text(encoding="utf-8")
    except OSError:
        return
    advice = "for ncu: run as root, or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
    free = "RmProfilingAdminOnly: 1" not in text
    yield _whether("profiler counters", free, advice, yes="for everybody", no="for root alone")


def _of_devices(nvml: Any) -> Iterator[Finding]:
    count = _ask(nvml, "nvmlDeviceGetCount") or 0
    if not count:
        yield Finding(subject="GPU", found="none", advice="see whether nvidia-smi lists one, and CUDA_VISIBLE_DEVICES")
    for index in range(count):
        handle = _ask(nvml, "nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            yield Finding(subject=f"GPU {index}", found="unreadable", advice="run as a user who may use it")
            continue
        yield from _of_device(nvml, handle, f"GPU {index}")


def _of_device(nvml: Any, handle: Any, where: str) -> Iterator[Finding]:
    capability = tuple(_ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle) or (0, 0))
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    size = f", {memory.total / 2**30:.0f} GiB" if memory else ""
    advice = None
    if capability < LEAST_CAPABILITY:
        advice = f"the kernels need compute capability {_dotted(LEAST_CAPABILITY)}; simulate this device instead"
    elif capability < HOPPER:
        advice = "tiles by descriptors and pingpong tiles need Hopper; the others work"
    name = _ask(nvml, "nvmlDeviceGetName", handle)
    yield Finding(subject=where, found=f"{name}, compute capability {_dotted(capability)}{size}", advice=advice)
    limit_mw, drawn_mw = (_ask(nvml, f"nvmlDeviceGet{what}", handle) for what in ("EnforcedPowerLimit", "PowerUsage"))
    if limit_mw and drawn_mw is not None:
        yield Finding(subject=f"{where} power", found=f"{drawn_mw / 1000:.0f} of {limit_mw / 1000:.0f} W")
    told = _ask(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle) is not None
    advice = "energy needs a whole GPU, Volta or newer; times are measured without it"
    yield _whether(f"{where} energy counter", told, advice)
    yield _of_mig(nvml, handle, where)
    gpm = _ask(nvml, "nvmlGpmQueryDeviceSupport", handle)
    advice = "utilisation of SMs, tensor units and DRAM needs Hopper or newer"
    yield _whether(f"{where} utilisation counters", bool(gpm and gpm.isSupportedDevice), advice)
    others = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle)
    if others:
        advice = "measurements need the GPU to themselves; wait, or choose another by CUDA_VISIBLE_DEVICES"
        yield Finding(subject=f"{where} load", found=f"{len(others)} processes compute on it", advice=advice)


def _of_mig(nvml: Any, handle: Any, where: str) -> Finding:
    mode = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    if mode is None:
        return Finding(subject=f"{where} MIG", found="not there", advice="mig slices need an A100 or newer")
    now, pending = mode
    found = "on" if now else "off"
    advice = None if now == pending else "a change of MIG mode is pending: reset the GPU, or take the change back"
    return Finding(subject=f"{where} MIG", found=found, advice=advice)


def _dotted(capability: tuple[int, ...]) -> str:
    return ".".join(map(str, capability))
