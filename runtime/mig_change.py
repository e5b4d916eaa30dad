"""Changing the MIG instances of one GPU. Never run on MIG hardware.

A change is a list of steps that can be looked at first. It needs an explicit word, root and an idle GPU, and where a
step fails the former layout comes back.
"""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..policies.contract import DeviceSpec, MigPlacement
from ..policies.mig import illegality
from .mig import Mig, MigError, Offer

NUM_COMPUTE_PROFILES, WHOLE_ENGINE = 16, 0


@dataclass(frozen=True, slots=True)
class Step:
    """One change; it may be taken, and taken back, whatever has been done of it."""

    words: str
    """As a command of nvidia-smi would say it."""
    bring: Callable[[Any], object]
    """Brings a state about, from whatever there is."""
    after: Any
    before: Any


class MigChange(Mig):
    """One device, changed inside a `with` statement; `nvml` and `is_root` stand for pynvml and the user."""

    def __init__(self, index: int = 0, *, nvml: Any = None, is_root: bool | None = None) -> None:
        super().__init__(index, nvml=nvml)
        self._is_root = os.geteuid() == 0 if is_root is None else is_root

    def steps(self, wanted: Sequence[MigPlacement], device: DeviceSpec | None = None) -> list[Step]:
        """Return what would be done, in order, to let these instances alone stand; nothing is changed. Empty: MIG off.

        Raises:
            MigError: the device cannot hold them together, or does not offer one.
        """
        state = self.state()
        offers = {offer.name: offer for offer in state.offers}
        for place in wanted:
            offer = offers.get(place.profile)
            if offer is None or place.start not in offer.starts:
                where = f"at {list(offer.starts)}" if offer else "not at all"
                raise MigError(
                    f"GPU {self._index} offers {place.profile} {where}, not at {place.start}; choose another"
                )
        if wanted and device is not None and (problem := illegality(wanted, device)):
            raise MigError(problem)
        # Those that stand and are not wanted go first: a place may be taken by two profiles.
        gone = [(offers[place.profile], place) for place in state.instances if place not in wanted]
        steps = [step for one in gone for step in self._removal(*one)]
        if bool(wanted) != state.enabled:
            steps.append(self._mode(int(bool(wanted))))
        new = [(offers[place.profile], place) for place in wanted if place not in state.instances]
        return steps + [step for one in new for step in self._creation(*one)]

    def _mode(self, on: int) -> Step:
        return Step(f"nvidia-smi -i {self._index} -mig {on}", self._set_mode, on, 1 - on)

    def _removal(self, offer: Offer, place: MigPlacement) -> list[Step]:
        handle, mig = self._handle(offer, place), f"nvidia-smi mig -i {self._index}"
        number, computes = self._ask("nvmlGpuInstanceGetInfo", handle).id, [one for one, _ in self._computes(handle)]
        where = f"{place.profile} at {place.start}"
        return [
            Step(f"{mig} -dci -gi {number}", partial(self._set_computes, offer, place), [], computes),
            Step(f"{mig} -dgi -gi {number}  # {where}", partial(self._set_instance, offer, place), False, True),
        ]

    def _creation(self, offer: Offer, place: MigPlacement) -> list[Step]:
        mig, at = f"nvidia-smi mig -i {self._index}", f"{offer.profile_id}:{place.start}"
        return [
            Step(f"{mig} -cgi {at}  # {place.profile}", partial(self._set_instance, offer, place), True, False),
            Step(f"{mig} -cci  # over all of it", partial(self._set_computes, offer, place), None, []),
        ]

    # What follows brings a state about from whatever there is, so that a step that failed half-way can be taken back.

    def _set_mode(self, on: int) -> None:
        if self._ask("nvmlDeviceGetMigMode", self._device) == [on, on]:
            return
        self._ask("nvmlDeviceSetMigMode", self._device, on)
        if self._ask("nvmlDeviceGetMigMode", self._device)[0] != on:
            raise MigError(f"GPU {self._index} changes its MIG mode only when it is reset; reset it, and try again")

    def _handle(self, offer: Offer, place: MigPlacement) -> Any:
        return next((held for found, held in self._standing(offer) if found == place), None)

    def _set_instance(self, offer: Offer, place: MigPlacement, stands: bool) -> None:
        handle = self._handle(offer, place)
        if handle is not None and not stands:
            self._ask("nvmlGpuInstanceDestroy", handle)
        elif handle is None and stands:
            at = self._nvml.c_nvmlGpuInstancePlacement_t()
            at.start, at.size = place.start, offer.memory_slices
            self._ask("nvmlDeviceCreateGpuInstanceWithPlacement", self._device, offer.profile_id, at)

    def _computes(self, instance: Any) -> list[tuple[int, Any]]:
        """Return the compute instances of a GPU instance: profile and handle."""
        found: list[tuple[int, Any]] = []
        for info in self._compute_profiles(instance):
            asked = "nvmlGpuInstanceGetComputeInstances", instance, info.id
            held = self._listed(self._nvml.c_nvmlComputeInstance_t, info.instanceCount, *asked)
            found += [(info.id, one) for one in held]
        return found

    def _compute_profiles(self, instance: Any) -> list[Any]:
        asked = (
            self._maybe("nvmlGpuInstanceGetComputeInstanceProfileInfo", instance, profile, WHOLE_ENGINE)
            for profile in range(NUM_COMPUTE_PROFILES)
        )
        return [info for info in asked if info is not None]

    def _set_computes(self, offer: Offer, place: MigPlacement, wanted: list[int] | None) -> None:
        """Let compute instances of these profiles stand in a GPU instance; None: one over all of it."""
        handle = self._handle(offer, place)
        if handle is None:
            return
        if wanted is None:
            wanted = [max(self._compute_profiles(handle), key=lambda info: info.sliceCount).id]
        left = list(wanted)
        for profile, compute in self._computes(handle):
            if profile in left:
                left.remove(profile)
            else:
                self._ask("nvmlComputeInstanceDestroy", compute)
        for profile in left:
            self._ask("nvmlGpuInstanceCreateComputeInstance", handle, profile)

    def change(self, wanted: Sequence[MigPlacement], *, allowed: bool, device: DeviceSpec | None = None) -> None:
        """Let these instances alone stand.

        Raises:
            MigError: nobody allowed it, the user is not root, something runs on the GPU, or a step failed; then the
                former layout stands again, or the sentence says which steps bring it back.
        """
        if not allowed:
            raise MigError("changing MIG instances stops whatever runs on the GPU; allow it explicitly (--change)")
        if not self._is_root:
            raise MigError("changing MIG instances needs root; run as root, or use the instances that stand")
        steps = self.steps(wanted, device)
        if steps and self._ask("nvmlDeviceGetComputeRunningProcesses", self._device):
            raise MigError(f"something runs on GPU {self._index}; stop it before its instances change")
        done: list[Step] = []
        try:
            for step in steps:
                done.append(step)
                step.bring(step.after)
        except MigError as error:
            self._take_back(done, error)
            raise MigError(f"{error}; the former layout stands again") from error

    def _take_back(self, done: list[Step], error: MigError) -> None:
        while done:
            try:
                done[-1].bring(done[-1].before)
            except MigError as second:
                left = "; ".join(f"take back `{step.words}`" for step in reversed(done))
                raise MigError(f"{error}; and then {second}. The layout is not the former one: {left}") from error
            done.pop()

    @contextmanager
    def layout(
        self, wanted: Sequence[MigPlacement], *, allowed: bool, device: DeviceSpec | None = None
    ) -> Generator[None]:
        """Let these instances stand while the context lasts, then those from before."""
        before = self.state().instances
        self.change(wanted, allowed=allowed, device=device)
        try:
            yield
        finally:
            self.change(before, allowed=allowed)
