"""MIG against an NVML that answers with the tables of real devices, and fails at every call in turn."""

import ctypes
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertslice.policies.contract import MigPlacement
from expertslice.policies.data import load_device
from expertslice.policies.mig import maximal_layouts
from expertslice.runtime.mig import MigError
from expertslice.runtime.mig_change import MigChange as Mig

H100, A100 = load_device("h100-sxm5-80gb"), load_device("a100-sxm4-80gb")
NVML_IDS = {(1, 1): 19, (1, 2): 15, (2, 2): 14, (3, 4): 9, (4, 4): 5, (7, 8): 0}
"""By compute and memory slices, as both devices number them."""
NUMBERS = {(1, 1): 0, (2, 2): 1, (3, 4): 2, (4, 4): 3, (7, 8): 4, (1, 2): 9}


class FakeError(Exception):
    pass


class NotSupportedError(FakeError):
    pass


class InvalidArgumentError(FakeError):
    pass


class Placement(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint), ("size", ctypes.c_uint))


@dataclass
class Info:
    id: int
    name: bytes = b""
    sliceCount: int = 0
    instanceCount: int = 1
    multiprocessorCount: int = 0
    memorySizeMB: int = 0
    placement: object = None


@dataclass
class Instance:
    profile: object
    start: int
    compute: list = field(default_factory=list)


class FakeNvml:
    """One device with the MIG table of its file."""

    NVMLError, NVMLError_NotSupported, NVMLError_InvalidArgument = FakeError, NotSupportedError, InvalidArgumentError
    c_nvmlGpuInstancePlacement_t = Placement
    c_nvmlGpuInstance_t = c_nvmlComputeInstance_t = ctypes.py_object

    def __init__(self, device, *, enabled=False, needs_reset=False, mig=True):
        self.device, self.mode, self.needs_reset, self.mig = device, int(enabled), needs_reset, mig
        self.pending, self.instances, self.processes = int(enabled), [], []
        self.calls, self.fail_at, self.initialised = [], set(), 0
        self.by_id = {NVML_IDS[p.compute_slices, p.memory_slices]: p for p in device.mig_profiles}

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if not name.startswith("nvml"):
            return found
        self.calls.append(name)
        if len(self.calls) in self.fail_at:

            def fail(*_):
                raise FakeError("Unknown Error")

            return fail
        return found

    def nvmlInit(self):
        self.initialised += 1

    def nvmlShutdown(self):
        self.initialised -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        assert index == 0
        return "gpu"

    def nvmlDeviceGetMigMode(self, handle):
        if not self.mig:
            raise NotSupportedError("Not Supported")
        return [self.mode, self.pending]

    def nvmlDeviceSetMigMode(self, handle, mode):
        assert not self.instances
        self.pending = mode
        if not self.needs_reset:
            self.mode = mode
        return 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return self.processes

    def nvmlDeviceGetGpuInstanceProfileInfo(self, handle, number):
        for profile_id, p in self.by_id.items():
            if NUMBERS[p.compute_slices, p.memory_slices] == number:
                return Info(
                    profile_id,
                    f"MIG {p.name}".encode(),
                    p.compute_slices,
                    p.max_instances,
                    p.sm_count,
                    p.memory_bytes >> 20,
                )
        if number == 7:
            return Info(20, b"MIG 1g.10gb+me", 1)
        raise NotSupportedError("Not Supported") if number < 18 else InvalidArgumentError("Invalid Argument")

    def nvmlDeviceGetGpuInstancePossiblePlacements(self, handle, profile_id, places, count):
        p = self.by_id[profile_id]
        count._obj.value = len(p.starts)
        for i, start in enumerate(p.starts if places is not None else ()):
            places[i].start, places[i].size = start, p.memory_slices

    def nvmlDeviceGetGpuInstances(self, handle, profile_id, held, count):
        assert self.mode
        ours = [one for one in self.instances if one.profile is self.by_id[profile_id]]
        count._obj.value = len(ours)
        for i, one in enumerate(ours):
            held[i] = one

    def nvmlGpuInstanceGetInfo(self, instance):
        return Info(3, placement=Placement(instance.start, instance.profile.memory_slices))

    def nvmlDeviceCreateGpuInstanceWithPlacement(self, handle, profile_id, place):
        p = self.by_id[profile_id]
        taken = {s for one in self.instances for s in range(one.start, one.start + one.profile.memory_slices)}
        asked = set(range(place.start, place.start + place.size))
        assert self.mode
        assert (place.start in p.starts, place.size) == (True, p.memory_slices)
        assert not taken & asked
        self.instances.append(Instance(p, place.start))
        return self.instances[-1]

    def nvmlGpuInstanceGetComputeInstanceProfileInfo(self, instance, number, engine):
        assert engine == 0
        sizes = {0: 1, 1: 2, 2: 3, 3: 4, 4: 7}
        if number not in sizes or sizes[number] > instance.profile.compute_slices:
            raise NotSupportedError("Not Supported")
        return Info(number, sliceCount=sizes[number], instanceCount=instance.profile.compute_slices // sizes[number])

    def nvmlGpuInstanceCreateComputeInstance(self, instance, profile_id):
        assert {0: 1, 1: 2, 2: 3, 3: 4, 4: 7}[profile_id] <= instance.profile.compute_slices
        instance.compute.append((profile_id, instance))
        return instance.compute[-1]

    def nvmlGpuInstanceGetComputeInstances(self, instance, profile_id, held, count):
        ours = [one for one in instance.compute if one[0] == profile_id]
        count._obj.value = len(ours)
        for i, one in enumerate(ours):
            held[i] = one

    def nvmlComputeInstanceDestroy(self, compute):
        compute[1].compute.remove(compute)

    def nvmlGpuInstanceDestroy(self, instance):
        assert not instance.compute
        self.instances.remove(instance)

    def layout(self):
        return sorted((one.profile.name, one.start, len(one.compute)) for one in self.instances)


def at(profile, start):
    return MigPlacement(profile=profile, start=start)


def standing(device, *places):
    """Return a device on which these instances stand."""
    fake = FakeNvml(device)
    with Mig(nvml=fake, is_root=True) as mig:
        mig.change(places, allowed=True)
    fake.calls.clear()
    return fake


@pytest.mark.parametrize("device", [H100, A100], ids=lambda device: device.name)
def test_profiles_and_places_are_read_with_mig_off(device):
    fake = FakeNvml(device)
    with Mig(nvml=fake) as mig:
        state = mig.state()
    assert not state.enabled
    assert state.instances == ()
    ours = {
        p.name: (p.compute_slices, p.memory_slices, p.starts, p.max_instances, p.sm_count) for p in device.mig_profiles
    }
    found = {o.name: (o.compute_slices, o.memory_slices, o.starts, o.max_instances, o.sm_count) for o in state.offers}
    assert found == ours
    assert fake.initialised == 0
    assert not [name for name in fake.calls if "Set" in name or "Create" in name or "Destroy" in name]


def test_a_dry_run_prints_the_steps_and_changes_nothing():
    fake = standing(H100, at("7g.80gb", 0))
    with Mig(nvml=fake) as mig:
        words = [step.words for step in mig.steps([at("3g.40gb", 4), at("4g.40gb", 0)], H100)]
    assert words == [
        "nvidia-smi mig -i 0 -dci -gi 3",
        "nvidia-smi mig -i 0 -dgi -gi 3  # 7g.80gb at 0",
        "nvidia-smi mig -i 0 -cgi 9:4  # 3g.40gb",
        "nvidia-smi mig -i 0 -cci  # over all of it",
        "nvidia-smi mig -i 0 -cgi 5:0  # 4g.40gb",
        "nvidia-smi mig -i 0 -cci  # over all of it",
    ]
    assert fake.layout() == [("7g.80gb", 0, 1)]
    off = FakeNvml(H100)
    with Mig(nvml=off) as mig:
        assert mig.steps([at("7g.80gb", 0)])[0].words == "nvidia-smi -i 0 -mig 1"
    assert off.mode == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_layout_follows_any_other_and_the_first_comes_back(data):
    device = data.draw(st.sampled_from([H100, A100]))
    first, second = (data.draw(st.sampled_from(maximal_layouts(device))) for _ in range(2))
    fake = standing(device, *first)
    before = fake.layout()
    with Mig(nvml=fake, is_root=True) as mig:
        with mig.layout(second, allowed=True, device=device):
            assert fake.layout() == sorted((place.profile, place.start, 1) for place in second)
            assert set(mig.state().instances) == set(second)
        assert fake.layout() == before
        mig.change((), allowed=True)
    assert (fake.layout(), fake.mode) == ([], 0)


FORMER = (at("3g.40gb", 0), at("3g.40gb", 4))
WANTED = (at("4g.40gb", 0), at("1g.10gb", 4), at("2g.20gb", 4))[:2]


def calls_of_a_change():
    fake = standing(H100, *FORMER)
    with Mig(nvml=fake, is_root=True) as mig:
        mig.change(WANTED, allowed=True, device=H100)
    return len(fake.calls)


def test_whatever_call_fails_the_former_layout_stands_or_the_way_back_is_said():
    for call in range(1, calls_of_a_change() + 1):
        fake = standing(H100, *FORMER)
        fake.fail_at = {call}
        with pytest.raises(MigError) as caught, Mig(nvml=fake, is_root=True) as mig:
            mig.change(WANTED, allowed=True, device=H100)
        said = str(caught.value)
        assert "\n" not in said
        assert "Unknown Error" in said
        if call < calls_of_a_change():
            assert fake.layout() == [("3g.40gb", 0, 1), ("3g.40gb", 4, 1)], (call, fake.calls[-5:])


def test_where_the_way_back_fails_too_the_steps_are_said(monkeypatch):
    fake = standing(H100, *FORMER)

    def refuse(*_):
        raise FakeError("In use")

    monkeypatch.setattr(fake, "nvmlDeviceCreateGpuInstanceWithPlacement", refuse, raising=False)
    said = "In use.*; and then .*The layout is not the former one: take back `nvidia-smi mig -i 0 -dgi -gi 3"
    with Mig(nvml=fake, is_root=True) as mig, pytest.raises(MigError, match=said):
        mig.change(WANTED, allowed=True)


def test_compute_instances_of_a_former_layout_come_back_as_they_were():
    fake = standing(H100, *FORMER)
    (first, _), big = fake.instances, fake.instances[0].compute
    big.clear()
    big += [(0, first), (1, first)]
    fake.calls.clear()
    fake.fail_at = {calls_of_a_change() - 5}
    with Mig(nvml=fake, is_root=True) as mig, pytest.raises(MigError, match="the former layout stands again"):
        mig.change(WANTED, allowed=True)
    assert [sorted(profile for profile, _ in one.compute) for one in sorted(fake.instances, key=lambda i: i.start)] == [
        [0, 1],
        [2],
    ]


def test_a_change_needs_a_word_root_an_idle_gpu_and_a_legal_layout():
    fake = standing(H100, *FORMER)
    with Mig(nvml=fake, is_root=False) as mig:
        with pytest.raises(MigError, match="allow it explicitly"):
            mig.change(WANTED, allowed=False)
        with pytest.raises(MigError, match="needs root"):
            mig.change(WANTED, allowed=True)
    with Mig(nvml=fake, is_root=True) as mig:
        with pytest.raises(MigError, match=r"offers 3g.40gb at \[0, 4\], not at 1"):
            mig.change([at("3g.40gb", 1)], allowed=True)
        with pytest.raises(MigError, match=r"offers 9g\.1gb not at all"):
            mig.change([at("9g.1gb", 0)], allowed=True)
        with pytest.raises(MigError, match="both take memory slice 4"):
            mig.change([at("3g.40gb", 4), at("2g.20gb", 4)], allowed=True, device=H100)
        fake.processes = ["training"]
        with pytest.raises(MigError, match="something runs on GPU 0"):
            mig.change(WANTED, allowed=True)
        mig.change(FORMER, allowed=True)
    assert len(fake.instances) == 2


def test_a_mode_that_waits_for_a_reset_is_taken_back_and_said():
    fake = FakeNvml(A100, needs_reset=True)
    with Mig(nvml=fake, is_root=True) as mig, pytest.raises(MigError, match="only when it is reset"):
        mig.change([at("7g.80gb", 0)], allowed=True)
    assert fake.mode == fake.pending == 0


def test_a_device_without_mig_says_so():
    with Mig(nvml=FakeNvml(H100, mig=False)) as mig, pytest.raises(MigError, match="has no MIG"):
        mig.state()


def test_the_command_shows_prints_steps_and_changes_only_when_told(monkeypatch, capsys):
    from expertslice.experiments import cli

    fake = standing(H100, *FORMER)
    fake.nvmlInit, fake.nvmlShutdown = (lambda: None), (lambda: None)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("os.geteuid", lambda: 0)

    def run(*arguments):
        code = cli.run(["mig", *arguments])
        return code, *capsys.readouterr()

    code, out, _ = run()
    assert code == 0
    assert all(words in out for words in ("MIG on", "1g.10gb", "0 2 4 6", "stands: 3g.40gb@4"))
    code, out, _ = run("7g.80gb@0")
    assert out.count("nvidia-smi mig -i 0") == 6
    assert fake.layout() == [("3g.40gb", 0, 1), ("3g.40gb", 4, 1)]
    assert run("7g.80gb@0", "--change")[1].endswith("done\n")
    assert fake.layout() == [("7g.80gb", 0, 1)]
    assert run("off", "--change")[0] == 0
    assert (fake.layout(), fake.mode) == ([], 0)
    assert run("half")[2] == "expertslice: instance 'half' is not profile@place; write for example 3g.40gb@0, or off\n"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    code, _, err = run("7g.80gb@0", "--change")
    assert (code, err) == (
        2,
        "expertslice: changing MIG instances needs root; run as root, or use the instances that stand\n",
    )
