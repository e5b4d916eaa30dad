"""Captured graphs within a budget of memory: the least recently used goes first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Graph = TypeVar("Graph")


class GraphCache(Generic[Key, Graph]):
    """Graphs by what they were captured for."""

    def __init__(self, budget_bytes: int, capture: Callable[[Key], tuple[Graph, int]]) -> None:
        """Keep graphs of so many bytes together; `capture` returns a graph and the bytes it holds."""
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes for graphs; give 0 or more")
        self._budget_bytes, self._capture = budget_bytes, capture
        self._held: OrderedDict[Key, tuple[Graph, int]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        """Return whether a graph is there."""
        return key in self._held

    def __len__(self) -> int:
        """Return how many graphs are there."""
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        """Return what the graphs hold together."""
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
        """Let all graphs go."""
        self._held.clear()
