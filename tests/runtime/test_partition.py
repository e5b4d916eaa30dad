"""Green contexts on a driver that exists in this file alone: disjoint groups, counts read back, nothing left behind."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertslice.runtime import partition
from expertslice.runtime.partition import Partition, PartitionError, Partitions, allot


class FakeDriver:
    """A driver of 132 SMs that fails at the call named, grants what it is told, and knows what is alive."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)

    def __init__(self, *, fails_at=None, nth=1, granted=None, group=None, odd=False):
        self.fails_at, self.nth, self.granted, self.group = fails_at, nth, granted, group
        self.odd = odd
        self.calls, self.alive, self.used = [], [], []

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args):
            self.calls.append(name)
            if name == self.fails_at and self.calls.count(name) == self.nth:
                return (801, *[None] * 3)[: 1 if "Destroy" in name else 2]
            return (0, *getattr(self, f"on_{name}")(*args))

        return call

    def resource(self, sms, first=0):
        return SimpleNamespace(sm=SimpleNamespace(smCount=sms), first=first)

    def on_cuDeviceGet(self, ordinal):
        return (ordinal,)

    def on_cuDeviceGetDevResource(self, device, kind):
        return (self.resource(132),)

    def on_cuDevSmResourceSplitByCount(self, most, whole, flags, least):
        assert (flags, least) == (1, 2)
        size = self.group or least
        groups = [self.resource(size, i * size) for i in range(132 // size)]
        if self.odd:
            groups[-1] = self.resource(2 * size, groups[-1].first)
        return groups, len(groups), self.resource(132 % size)

    def on_cuDevResourceGenerateDesc(self, groups, count):
        assert len(groups) == count
        return ([sm for group in groups for sm in range(group.first, group.first + group.sm.smCount)],)

    def on_cuGreenCtxCreate(self, descriptor, device, flags):
        self.used.append(descriptor)
        self.alive.append(("context", len(self.used)))
        return (self.alive[-1],)

    def on_cuGreenCtxGetDevResource(self, context, kind):
        return (self.resource(self.granted or len(self.used[context[1] - 1])),)

    def on_cuGreenCtxStreamCreate(self, context, flags, priority):
        self.alive.append(1000 + context[1])
        return (self.alive[-1],)

    def on_cuGreenCtxDestroy(self, context):
        self.alive.remove(context)
        return ()

    def on_cuStreamDestroy(self, stream):
        self.alive.remove(stream)
        return ()


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    monkeypatch.setattr(partition, "_current_device", lambda: 0)
    monkeypatch.setattr(partition, "_wrapped", lambda handle: f"stream {handle}")


@given(groups=st.lists(st.integers(1, 20), min_size=1, max_size=6), group_sms=st.sampled_from([2, 8]))
def test_slices_get_runs_of_groups_that_do_not_meet(groups, group_sms):
    runs = allot([n * group_sms for n in groups], group_sms, sum(groups))
    assert [len(run) for run in runs] == groups
    taken = [i for run in runs for i in run]
    assert taken == list(range(len(taken)))


@pytest.mark.parametrize(("wanted", "group_sms"), [((32, 100), 2), ((8, 16, 104), 4), ((132,), 2), ((2, 2), 2)])
def test_contexts_are_disjoint_and_as_large_as_asked(wanted, group_sms):
    driver = FakeDriver(group=group_sms)
    with Partition(wanted=wanted, driver=driver) as split:
        assert tuple(share.sm_count for share in split.shares) == wanted
        assert [share.stream for share in split.shares] == [f"stream {1001 + i}" for i in range(len(wanted))]
        sms = [sm for used in driver.used for sm in used]
        assert len(set(sms)) == len(sms) == sum(wanted)
        assert driver.calls.count("cuDevSmResourceSplitByCount") == 1
    assert not driver.alive
    assert split.shares == ()


@pytest.mark.parametrize(
    ("wanted", "group_sms", "message"),
    [
        ((33,), 2, "green context of 33 SMs; the driver gives multiples of 2"),
        ((0, 8), 8, "green context of 0 SMs"),
        ((72, 64), 8, "green contexts of 136 SMs; the device has 128 in groups of 8"),
    ],
)
def test_what_cannot_be_split_is_refused(wanted, group_sms, message):
    driver = FakeDriver(group=group_sms)
    with pytest.raises(PartitionError, match=message), Partition(wanted=wanted, driver=driver):
        pass
    assert not driver.alive


def test_other_counts_than_asked_are_refused_and_nothing_is_left():
    driver = FakeDriver(granted=24)
    with (
        pytest.raises(PartitionError, match="of 32 SMs: the driver granted 24"),
        Partition(wanted=(32,), driver=driver),
    ):
        pass
    assert not driver.alive
    driver = FakeDriver(odd=True)
    with (
        pytest.raises(PartitionError, match=r"the driver cut groups of \[2, 4\] SMs"),
        Partition(wanted=(32,), driver=driver),
    ):
        pass


def test_partitions_are_created_once_and_all_destroyed(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(partition, "_bindings", lambda: driver)
    held = Partitions()
    first = held(32, 100)
    assert len(first) == 2
    assert held(32, 100) is first
    assert held(16, 116) != first
    assert driver.calls.count("cuGreenCtxCreate") == 4
    held.close()
    assert not driver.alive


CREATING = (
    "cuDeviceGet", "cuDeviceGetDevResource", "cuDevSmResourceSplitByCount", "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate", "cuGreenCtxGetDevResource", "cuGreenCtxStreamCreate",
)  # fmt: skip


@pytest.mark.parametrize(("name", "nth"), [(name, 1) for name in CREATING] + [(name, 2) for name in CREATING[3:]])
def test_a_call_that_fails_leaves_nothing_behind(name, nth):
    driver = FakeDriver(fails_at=name, nth=nth)
    with pytest.raises(PartitionError, match=f"{name} failed with 801"), Partition(wanted=(16, 16), driver=driver):
        pass
    assert not driver.alive


def test_bindings_that_are_too_old_are_named():
    old = SimpleNamespace(CUresult=FakeDriver.CUresult, CUdevResourceType=FakeDriver.CUdevResourceType)
    with (
        pytest.raises(PartitionError, match="no cuDeviceGet; green contexts need 12"),
        Partition(wanted=(8,), driver=old),
    ):
        pass
