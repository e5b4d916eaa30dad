"""When steps are captured, and captured graphs within a budget of memory: the least recently used goes first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Graph = TypeVar("Graph")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRule:
    """When a graph is worth capturing; until then its steps are launched kernel by kernel."""

    least_calls: int = 0
    """Of the same graph before it is captured; 0: captured before step 0, for every declared layout and load."""
    least_tokens: int = 0
    stable: bool = False
    """Calls count only while one follows another: a graph of another shape in between starts the count again."""

    def __post_init__(self) -> None:
        if min(self.least_calls, self.least_tokens) < 0:
            raise ValueError(
                f"capture after {self.least_calls} calls of {self.least_tokens} tokens; neither may be negative"
            )


CAPTURE_RULES = {"all": CaptureRule(), "paper": CaptureRule(least_calls=10, least_tokens=32, stable=True)}
"""By name; `paper` is the heuristic of its appendix A.2."""


class Calls(Generic[Key]):
    """How often graphs were called for, and whether a rule then captures them."""

    def __init__(self, rule: CaptureRule) -> None:
        self._rule = rule
        self._calls: dict[Key, int] = {}
        self._last: Key | None = None

    def captures(self, key: Key, num_tokens: int) -> bool:
        """Count one more call of a step with so many tokens; return whether it may be captured now."""
        if self._rule.stable and key != self._last:
            self._calls.clear()
        self._last = key
        if num_tokens < self._rule.least_tokens:
            return False
        before = self._calls.get(key, 0)
        self._calls[key] = before + 1
        return before >= self._rule.least_calls


class GraphCache(Generic[Key, Graph]):
    """Graphs by what they were captured for."""

    def __init__(self, budget_bytes: int, capture: Callable[[Key], tuple[Graph, int]]) -> None:
        """Keep graphs of so many bytes together; `capture` returns a graph and the bytes it holds."""
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes for graphs; give 0 or more")
        self._budget_bytes, self._capture = budget_bytes, capture
        self._held: OrderedDict[Key, tuple[Graph, int]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        return sum(size for _, size in self._held.values())

    def get(self, key: Key) -> Graph:
        """Return a graph, captured now if it is not there; the newest stays though it alone exceeds the budget."""
        if key not in self._held:
            self._held[key] = self._capture(key)
            while len(self._held) > 1 and self.held_bytes > self._budget_bytes:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key][0]

    def clear(self) -> None:
        self._held.clear()
