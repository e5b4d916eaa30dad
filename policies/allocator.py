"""The paper's slice allocation (its Algorithm A.3) on values: who holds what goes in and comes out.

An expert holds slices with a priority. A request is served from free slices, the least utilised first; when too few
are free, allocations of strictly lower priority make room, the lowest first. The paper gives a slice to one expert;
`capacity` lets it hold more, which is how many experts share a few slices.

`place_longest_first` is the same rule for all experts of all layers at once: falling load, least utilised slice first.

Shape letters: L layers, E experts, S slices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..traces.schema import F64, I16


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The slices an expert holds, and how much it matters."""

    slice_ids: tuple[int, ...]
    priority: float


Held = Mapping[int, Allocation]
"""Allocations by expert id, the oldest first."""


def free_slices(held: Held, utilisation_S: Sequence[float], capacity: int = 1) -> list[int]:
    """Return the slices with room for one more expert, the least utilised first; ties by lower id."""
    taken = [slice_id for a in held.values() for slice_id in a.slice_ids]
    free = (s for s in range(len(utilisation_S)) if taken.count(s) < capacity)
    return sorted(free, key=lambda s: utilisation_S[s])


def allocate(
    held: Held,
    expert_id: int,
    required_slices: int,
    priority: float,
    *,
    utilisation_S: Sequence[float],
    capacity: int = 1,
) -> Held:
    """Return the allocations after a request; the expert has none when there is no room even by eviction.

    An expert that holds something keeps it unchanged, and a request that fails evicts nobody.
    """
    if not 1 <= required_slices <= len(utilisation_S):
        raise ValueError(
            f"expert {expert_id} asks for {required_slices} slices; there are {len(utilisation_S)}, ask for no more"
        )
    if expert_id in held:
        return held
    kept = dict(held)
    # The lowest priority makes room first; of equal ones, the newest.
    victims = sorted((e for e in reversed(kept) if kept[e].priority < priority), key=lambda e: kept[e].priority)
    while len(free := free_slices(kept, utilisation_S, capacity)) < required_slices:
        if not victims:
            return held
        del kept[victims.pop(0)]
    return kept | {expert_id: Allocation(slice_ids=tuple(free[:required_slices]), priority=priority)}


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
