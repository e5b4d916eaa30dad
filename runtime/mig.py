"""MIG of one GPU through NVML: what it offers and which instances stand. Never run on MIG hardware.

It reads, with MIG off too, and changes nothing: see `mig_change`.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Self

from ..policies.contract import MigPlacement

NUM_GPU_PROFILES = 32
"""NVML numbers its profiles; those that a device lacks it refuses."""


class MigError(RuntimeError):
    """MIG cannot be read or changed here; one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A kind of GPU instance that the device offers."""

    name: str
    profile_id: int
    compute_slices: int
    memory_slices: int
    starts: tuple[int, ...]
    max_instances: int
    sm_count: int
    memory_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MigState:
    """What a device says about MIG."""

    enabled: bool
    pending: bool
    """What the mode will be after a reset of the GPU."""
    offers: tuple[Offer, ...]
    instances: tuple[MigPlacement, ...]


class Mig:
    """One device, read inside a `with` statement; `nvml` stands for pynvml."""

    def __init__(self, index: int = 0, *, nvml: Any = None) -> None:
        """Take the device of that index in NVML's own count."""
        if nvml is None:
            try:
                import pynvml as nvml
            except ImportError:
                raise MigError("MIG is read through NVML; install expertslice[gpu]") from None
        self._index, self._nvml = index, nvml

    def __enter__(self) -> Self:
        self._ask("nvmlInit")
        try:
            self._device = self._ask("nvmlDeviceGetHandleByIndex", self._index)
        except MigError:
            self._ask("nvmlShutdown")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("nvmlShutdown")

    def _ask(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, name)(*args)
        except self._nvml.NVMLError as error:
            why = f"{name} failed on GPU {self._index}: {error}"
            raise MigError(f"{why}; see whether nvidia-smi still reads it") from error

    def _maybe(self, name: str, *args: Any) -> Any:
        """Return None where the device lacks what is asked for."""
        lacking = (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_InvalidArgument)
        try:
            return self._ask(name, *args)
        except MigError as error:
            if isinstance(error.__cause__, lacking):
                return None
            raise

    def _listed(self, kind: Any, most: int, name: str, *args: Any) -> list[Any]:
        """Return what NVML writes into an array."""
        count, held = ctypes.c_uint(most), (kind * max(1, most))()
        self._ask(name, *args, held, ctypes.byref(count))
        return [held[i] for i in range(count.value)]

    def state(self) -> MigState:
        """Return mode, profiles with their legal places, and the instances that stand.

        Raises:
            MigError: the device has no MIG, or NVML fails.
        """
        mode = self._maybe("nvmlDeviceGetMigMode", self._device)
        if mode is None:
            raise MigError(f"GPU {self._index} has no MIG; it takes an A100, an H100 or newer")
        offers = tuple(offer for n in range(NUM_GPU_PROFILES) if (offer := self._offer(n)) is not None)
        found = [(place, offer) for offer in offers for place, _ in self._standing(offer)] if mode[0] else []
        instances = tuple(sorted((place for place, _ in found), key=lambda place: place.start))
        return MigState(enabled=bool(mode[0]), pending=bool(mode[1]), offers=offers, instances=instances)

    def _offer(self, profile: int) -> Offer | None:
        info = self._maybe("nvmlDeviceGetGpuInstanceProfileInfo", self._device, profile)
        name = "" if info is None else _text(info.name).removeprefix("MIG ")
        if info is None or "+" in name:
            # Variants that differ in media engines alone.
            return None
        asked, count = ("nvmlDeviceGetGpuInstancePossiblePlacements", self._device, info.id), ctypes.c_uint(0)
        self._ask(*asked, None, ctypes.byref(count))
        places = self._listed(self._nvml.c_nvmlGpuInstancePlacement_t, count.value, *asked)
        starts = tuple(sorted(place.start for place in places))
        return Offer(
            name=name,
            profile_id=info.id,
            compute_slices=info.sliceCount,
            memory_slices=places[0].size if starts else 0,
            starts=starts,
            max_instances=info.instanceCount,
            sm_count=info.multiprocessorCount,
            memory_mib=info.memorySizeMB,
        )

    def _standing(self, offer: Offer) -> list[tuple[MigPlacement, Any]]:
        """Return the instances of a profile, with their handles."""
        kind, most = self._nvml.c_nvmlGpuInstance_t, offer.max_instances
        return [
            (MigPlacement(profile=offer.name, start=self._ask("nvmlGpuInstanceGetInfo", one).placement.start), one)
            for one in self._listed(kind, most, "nvmlDeviceGetGpuInstances", self._device, offer.profile_id)
        ]


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
