"""Which sets of GPU instances a device can hold: profiles and their legal places are data in its file.

A placement occupies memory slices start .. start + size - 1. A layout is legal when every instance starts where its
profile may, no memory slice is taken twice and no profile appears more often than it may. A layout is maximal when no
instance can be added.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations

from .contract import DeviceSpec, MigPlacement, MigProfile, SliceLayout
from .layouts import uniform_slice


def profile_of(name: str, device: DeviceSpec) -> MigProfile:
    """Return a device's MIG profile by name."""
    for profile in device.mig_profiles:
        if profile.name == name:
            return profile
    known = ", ".join(p.name for p in device.mig_profiles) or "none"
    raise ValueError(f"MIG profile {name!r} is unknown on {device.name}; it has {known}, use one of them")


def illegality(placements: Sequence[MigPlacement], device: DeviceSpec) -> str | None:
    """Return why the device cannot hold these instances together, in one sentence; None when it can."""
    if not placements:
        return "MIG layout has no instances; give at least one placement"
    by_name = {p.name: p for p in device.mig_profiles}
    for place in placements:
        profile = by_name.get(place.profile)
        if profile is None:
            known = ", ".join(by_name) or "none"
            return f"MIG profile {place.profile!r} is unknown on {device.name}; it has {known}, use one of them"
        if place.start not in profile.starts:
            starts = list(profile.starts)
            return f"{place.profile} starts at memory slice {place.start}; it may start at {starts}, use one"
    for name, count in Counter(place.profile for place in placements).items():
        most = by_name[name].max_instances
        if count > most:
            return f"layout has {count} instances of {name}; {device.name} holds {most}, drop some"
    return next(_overlaps(placements, by_name), None)


def _overlaps(placements: Sequence[MigPlacement], by_name: dict[str, MigProfile]) -> Iterator[str]:
    for one, other in combinations(placements, 2):
        first = max(one.start, other.start)
        if first < min(place.start + by_name[place.profile].memory_slices for place in (one, other)):
            yield f"{one.profile} and {other.profile} both take memory slice {first}; move or drop one of them"


@lru_cache(maxsize=16)
def maximal_layouts(device: DeviceSpec) -> tuple[tuple[MigPlacement, ...], ...]:
    """Return every legal set of instances to which none can be added, each in order of its first memory slice."""
    options = sorted(
        (MigPlacement(profile=p.name, start=start) for p in device.mig_profiles for start in p.starts),
        key=lambda place: (place.start, place.profile),
    )
    found: list[tuple[MigPlacement, ...]] = []

    def fits(chosen: tuple[MigPlacement, ...], place: MigPlacement) -> bool:
        return illegality((*chosen, place), device) is None

    def extend(chosen: tuple[MigPlacement, ...], rest: Sequence[MigPlacement]) -> None:
        for index, place in enumerate(rest):
            if fits(chosen, place):
                extend((*chosen, place), rest[index + 1 :])
        if chosen and not any(fits(chosen, place) for place in options):
            found.append(chosen)

    extend((), options)
    return tuple(found)


def mig_layout(device: DeviceSpec, placements: Sequence[MigPlacement], tiles: Sequence[str]) -> SliceLayout:
    """Return one slice per instance, each filling its SMs with one CTA of its tile.

    Raises:
        ValueError: the device cannot hold the instances, or the number of tiles differs from theirs.
    """
    if problem := illegality(placements, device):
        raise ValueError(problem)
    if len(tiles) != len(placements):
        raise ValueError(f"{len(tiles)} tiles for {len(placements)} MIG instances; give one tile for each")
    sms = [profile_of(place.profile, device).sm_count for place in placements]
    slices = [uniform_slice("mig", sms[i], tile, instance=i) for i, tile in enumerate(tiles)]
    return SliceLayout(slices=tuple(slices), mig=tuple(placements))
