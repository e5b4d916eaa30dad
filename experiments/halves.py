"""Learn on one half of a trace's requests, judge on the other: nobody is judged on a request that it has seen.

Shape letters: N steps.
"""

from dataclasses import replace

import numpy as np

from ..traces.compose import Composition
from ..traces.trace import RoutingTrace, take_tokens
from .workload import FixedSteps, rebatched


def halves(trace: RoutingTrace, seed: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Return the trace with half of its requests, drawn by a seed, and with the others.

    Raises:
        ValueError: it has fewer than two requests.
    """
    requests = np.unique(trace.request_id_T)
    if len(requests) < 2:
        raise ValueError("the trace has a single request; give one with at least two to judge on unseen ones")
    first = np.random.default_rng(seed).permutation(requests)[: len(requests) // 2]
    in_first_T = np.isin(trace.request_id_T, first)
    one, other = (take_tokens(trace, keep_T, step_T=trace.step_T[keep_T]) for keep_T in (in_first_T, ~in_first_T))
    return one, other


def learn_then_judge(
    trace: RoutingTrace, like: Composition, *, learn_steps: int, judge_steps: int, seed: int
) -> FixedSteps:
    """Return batches of one half's requests, and after them batches of the other half's."""
    learn, judge = halves(trace, seed)
    parts = [
        rebatched(half, like, num_steps=num_steps, seed=seed + place)
        for place, (half, num_steps) in enumerate(((learn, learn_steps), (judge, judge_steps)))
    ]
    return replace(parts[1], kept=(*parts[0].kept, *parts[1].kept))
