"""Exclusive SM sets by green contexts: one split by the driver, so that no two slices can share an SM.

The driver cuts the device into equal groups of SMs, as small as it can: groups that could be co-scheduled as clusters
would leave SMs out, and how many differs from die to die. A slice gets as many groups as it needs, and a stream that
keeps to them, captured or not. What each slice was granted is read back from its context.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

FINEST_GROUP = 2
"""SMs; the driver cuts larger groups where the device has none so small."""
IGNORE_SM_COSCHEDULING, GREEN_CTX_DEFAULT_STREAM, STREAM_NON_BLOCKING = 1, 1, 1
"""Flags of cuda.h, whose names in the bindings changed between versions."""


class PartitionError(ValueError):
    """The driver cannot or did not give the SMs asked for."""


def allot(wanted: Sequence[int], group_sms: int, num_groups: int) -> list[range]:
    """Return the groups of slices that want so many SMs each, one run after another.

    Raises:
        PartitionError: a slice is no whole number of groups, or all slices need more groups than there are.
    """
    uneven = [sms for sms in wanted if sms < 1 or sms % group_sms]
    if uneven:
        raise PartitionError(
            f"green context of {uneven[0]} SMs; the driver gives multiples of {group_sms}, round to one"
        )
    ends = [sms // group_sms for sms in accumulate(wanted, initial=0)]
    if ends[-1] > num_groups:
        raise PartitionError(
            f"green contexts of {sum(wanted)} SMs; the device has {num_groups * group_sms} in groups of {group_sms}, "
            "ask for fewer"
        )
    return [range(*run) for run in pairwise(ends)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One slice's SMs and the stream that keeps to them."""

    sm_count: int
    """As granted."""
    stream: "torch.cuda.Stream"


@dataclass
class Partition:
    """Green contexts of the current device, from entering to leaving."""

    wanted: tuple[int, ...]
    """SMs of each slice."""
    priorities: tuple[int, ...] = ()
    """Of streams, lower first; empty: all 0."""
    driver: Any = None
    """Stands for cuda.bindings.driver."""
    shares: tuple[Share, ...] = ()
    _owned: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Self:
        """Split the device and create each slice's context and stream.

        Raises:
            PartitionError: the driver is too old, cannot split like this, or granted other counts.
        """
        if self.driver is None:
            self.driver = _bindings()
        try:
            self.shares = tuple(self._created())
        except BaseException:
            self._owned.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Destroy streams and contexts, the newest first."""
        self.shares = ()
        self._owned.close()

    def _created(self) -> Iterator[Share]:
        kind = self.driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        device = self._ask("cuDeviceGet", _current_device())
        whole = self._ask("cuDeviceGetDevResource", device, kind)
        found, group_sms = self._split(whole)
        priorities = self.priorities or (0,) * len(self.wanted)
        for run, priority in zip(allot(self.wanted, group_sms, len(found)), priorities, strict=True):
            groups = [found[i] for i in run]
            descriptor = self._ask("cuDevResourceGenerateDesc", groups, len(groups))
            context = self._ask("cuGreenCtxCreate", descriptor, device, GREEN_CTX_DEFAULT_STREAM)
            self._owned.callback(self._ask, "cuGreenCtxDestroy", context)
            granted = self._ask("cuGreenCtxGetDevResource", context, kind).sm.smCount
            asked = len(run) * group_sms
            if granted != asked:
                raise PartitionError(f"green context of {asked} SMs: the driver granted {granted}; use another split")
            stream = self._ask("cuGreenCtxStreamCreate", context, STREAM_NON_BLOCKING, priority)
            self._owned.callback(self._ask, "cuStreamDestroy", stream)
            yield Share(sm_count=granted, stream=_wrapped(int(stream)))

    def _split(self, whole: Any) -> tuple[list[Any], int]:
        """Return the device's groups and the SMs of each."""
        most = whole.sm.smCount // FINEST_GROUP
        split = self._ask("cuDevSmResourceSplitByCount", most, whole, IGNORE_SM_COSCHEDULING, FINEST_GROUP)
        groups = split[0][: split[1]]
        sizes = sorted({group.sm.smCount for group in groups})
        if len(sizes) != 1:
            raise PartitionError(f"the driver cut groups of {sizes} SMs; green contexts need equal ones")
        return groups, sizes[0]

    def _ask(self, name: str, *args: Any) -> Any:
        call = getattr(self.driver, name, None)
        if call is None:
            raise PartitionError(f"this cuda-bindings has no {name}; green contexts need 12.4 or newer")
        error, *found = call(*args)
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise PartitionError(
                f"{name} failed with {getattr(error, 'name', error)}; the driver may lack green contexts"
            )
        return found[0] if len(found) == 1 else tuple(found) if found else None


class Partitions:
    """Streams of partitions, each created once and kept, since graphs hold streams."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, ...], tuple[torch.cuda.Stream, ...]] = {}
        self._owned = ExitStack()

    def __call__(self, *wanted: int) -> "tuple[torch.cuda.Stream, ...]":
        """Return a stream for each number of SMs; PartitionError as of `Partition`."""
        if wanted not in self._held:
            split = self._owned.enter_context(Partition(wanted=wanted))
            self._held[wanted] = tuple(share.stream for share in split.shares)
        return self._held[wanted]

    def close(self) -> None:
        """Destroy them, the newest first."""
        self._held.clear()
        self._owned.close()


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise PartitionError("green contexts need cuda-bindings; install expertslice[gpu]") from None
    return driver


def _current_device() -> int:
    import torch

    # Torch's primary context must be there before the driver is asked.
    torch.cuda.current_stream()
    return torch.cuda.current_device()


def _wrapped(handle: int) -> "torch.cuda.Stream":
    import torch

    return torch.cuda.ExternalStream(handle)
