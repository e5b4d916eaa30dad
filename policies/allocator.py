"""The paper's slice allocation (its Algorithm A.3) on values: a pool goes in, a pool comes out.

An expert holds slices with a priority. A request is served from free slices, the least utilised first; when too few
are free, allocations of strictly lower priority make room, the lowest first. The paper gives a slice to one expert;
`capacity` lets it hold more, which is how many experts share a few slices.

`place_longest_first` is the same rule for all experts of all layers at once: falling load, least utilised slice first.

Shape letters: L layers, E experts, S slices.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..traces.schema import F64, I16


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The slices an expert holds, and how much it matters."""

    expert_id: int
    slice_ids: tuple[int, ...]
    priority: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePool:
    """Slices 0..S-1 with their recent utilisation, and who holds them."""

    utilisation_S: tuple[float, ...]
    capacity: int = 1
    """Allocations that one slice may serve."""
    allocations: tuple[Allocation, ...] = ()

    def __post_init__(self) -> None:
        if not self.utilisation_S or self.capacity < 1:
            raise ValueError(
                f"pool of {len(self.utilisation_S)} slices with capacity {self.capacity}; both must be at least 1"
            )

    def free_slices(self) -> tuple[int, ...]:
        """Return the slices with room, the least utilised first; ties by lower id."""
        held = [slice_id for a in self.allocations for slice_id in a.slice_ids]
        free = (s for s in range(len(self.utilisation_S)) if held.count(s) < self.capacity)
        return tuple(sorted(free, key=lambda s: (self.utilisation_S[s], s)))


def allocate(
    pool: SlicePool, expert_id: int, required_slices: int, priority: float
) -> tuple[SlicePool, Allocation | None]:
    """Return the pool after a request and what the expert now holds; None when there is no room even by eviction.

    An expert that holds something keeps it unchanged, and a request that fails evicts nobody.
    """
    if not 1 <= required_slices <= len(pool.utilisation_S):
        raise ValueError(
            f"expert {expert_id} asks for {required_slices} slices; the pool has {len(pool.utilisation_S)}, ask for "
            "1 up to that"
        )
    existing = next((a for a in pool.allocations if a.expert_id == expert_id), None)
    if existing is not None:
        return pool, existing
    cleared = pool
    # The lowest priority makes room first; of equal ones, the newest.
    victims = sorted((a for a in reversed(pool.allocations) if a.priority < priority), key=lambda a: a.priority)
    while len(cleared.free_slices()) < required_slices:
        if not victims:
            return pool, None
        cleared = release(cleared, victims.pop(0).expert_id)
    chosen = cleared.free_slices()[:required_slices]
    allocation = Allocation(expert_id=expert_id, slice_ids=chosen, priority=priority)
    return replace(cleared, allocations=(*cleared.allocations, allocation)), allocation


def release(pool: SlicePool, expert_id: int) -> SlicePool:
    """Return the pool without an expert's allocation, if it has one."""
    return replace(pool, allocations=tuple(a for a in pool.allocations if a.expert_id != expert_id))


def place_longest_first(load_LE: F64, speed_S: F64, *, capacity: int | None = None, busy_LS: F64 | None = None) -> I16:
    """Return the slice of each expert, placing the heaviest first where it would finish first.

    With equal speeds this is `allocate` of one slice per expert in order of falling load, each slice charged with
    what it was given. Ties: lower expert id, lower slice id. `capacity` bounds the experts per slice and layer;
    `busy_LS` is the time that slices are taken already.
    """
    num_layers, num_experts = load_LE.shape
    num_slices = speed_S.shape[0]
    room = num_experts if capacity is None else capacity
    if room * num_slices < num_experts:
        raise ValueError(f"{num_experts} experts do not fit {num_slices} slices of {room}; raise the capacity")
    layers = np.arange(num_layers)
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    slice_of_expert_LE = np.zeros((num_layers, num_experts), dtype=np.int16)
    finish_LS = np.zeros((num_layers, num_slices)) if busy_LS is None else busy_LS.copy()
    held_LS = np.zeros((num_layers, num_slices), dtype=np.int64)
    for rank in range(num_experts):
        expert_L = order_LE[:, rank]
        then_LS = finish_LS + load_LE[layers, expert_L][:, None] / speed_S
        then_LS[held_LS >= room] = np.inf
        slice_L = then_LS.argmin(axis=1)
        finish_LS[layers, slice_L] = then_LS[layers, slice_L]
        held_LS[layers, slice_L] += 1
        slice_of_expert_LE[layers, expert_L] = slice_L
    return slice_of_expert_LE
