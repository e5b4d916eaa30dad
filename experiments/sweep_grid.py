"""Policies with several values of their parameters, as written on the command line.

`hot_cold(min_gain=0.01|0.05, plan_every=8|32)` is four policies.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from ..policies.contract import Policy
from ..policies.registry import make_policy, policy_class

FORM = re.compile(r"\s*([^()\s]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
NEXT_PARAMETER = re.compile(r",\s*(?=\w+\s*=)")


def grid_of(text: str) -> Iterator[tuple[str, Policy[Any]]]:
    """Yield the name and the policy of every combination of parameters.

    Raises:
        ValueError: the text has another form, the policy is unknown, or a parameter is wrong.
    """
    found = FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"policy {text!r} has another form than name(parameter=value|value); write it like that")
    policy_class(found[1])
    parts = [part.partition("=") for part in NEXT_PARAMETER.split(found[2] or "") if part.strip()]
    if bad := [name for name, equals, values in parts if not (equals and values.strip())]:
        raise ValueError(f"policy {text!r}: {bad[0].strip()!r} has no value; write parameter=value|value")
    choices = {name.strip(): [value.strip() for value in values.split("|")] for name, _, values in parts}
    for values in itertools.product(*choices.values()):
        yield found[1], make_policy(found[1], dict(zip(choices, values, strict=True)))
