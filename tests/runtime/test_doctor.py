"""What the doctor says of machines that exist in this file alone."""

import re
from types import SimpleNamespace

import pytest

from expertslice.runtime.doctor import LIBRARIES, examine

ALL = dict.fromkeys(LIBRARIES, "1.0")


class FakeError(Exception):
    pass


class Machine:
    """NVML of a machine with some GPUs; what is named as missing fails."""

    NVMLError = FakeError

    def __init__(self, *, missing=(), gpus=1, cuda=13_000, capability=(9, 0), mig=(0, 0), processes=0):
        self.missing, self.open = missing, 0
        self.answers = {
            "nvmlSystemGetDriverVersion": "580.0",
            "nvmlSystemGetCudaDriverVersion": cuda,
            "nvmlDeviceGetCount": gpus,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetCudaComputeCapability": capability,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * 2**30),
            "nvmlDeviceGetName": "NVIDIA H100",
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetPowerUsage": 75_900,
            "nvmlDeviceGetTotalEnergyConsumption": 5,
            "nvmlDeviceGetMigMode": mig,
            "nvmlGpmQueryDeviceSupport": SimpleNamespace(isSupportedDevice=1),
            "nvmlDeviceGetComputeRunningProcesses": [object()] * processes,
        }

    def nvmlInit(self):
        if "nvmlInit" in self.missing:
            raise FakeError("no driver")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def __getattr__(self, name):
        if name not in self.__dict__.get("answers", {}):
            raise AttributeError(name)

        def answer(*_):
            if name in self.missing:
                raise FakeError(name)
            return self.answers[name]

        return answer


@pytest.fixture
def look(tmp_path):
    def examined(machine, libraries=ALL, parameters="RmProfilingAdminOnly: 0\n"):
        path = tmp_path / "params"
        if parameters is not None:
            path.write_text(parameters)
        found = examine(nvml=machine, libraries=libraries, parameters=path)
        assert machine.open == 0
        assert len({one.subject for one in found}) == len(found)
        return {one.subject: one for one in found}

    return examined


def test_a_whole_machine_needs_no_advice(look):
    found = look(Machine())
    assert not [one for one in found.values() if one.advice]
    assert found["driver"].found == "580.0, CUDA 13.0"
    assert found["GPU 0"].found == "NVIDIA H100, compute capability 9.0, 80 GiB"
    assert found["GPU 0 power"].found == "76 of 700 W"
    assert "GPU 0 load" not in found


@pytest.mark.parametrize(
    ("machine", "options", "subject", "advice"),
    [
        (Machine(missing=("nvmlInit",)), {}, "driver", "work without a GPU"),
        (Machine(gpus=0), {}, "GPU", "CUDA_VISIBLE_DEVICES"),
        (Machine(cuda=12_020), {}, "green contexts", "CUDA 12.4 or newer"),
        (Machine(capability=(7, 0)), {}, "GPU 0", "need compute capability 8.0"),
        (Machine(capability=(8, 0)), {}, "GPU 0", "need Hopper"),
        (Machine(mig=(0, 1)), {}, "GPU 0 MIG", "pending"),
        (Machine(processes=2), {}, "GPU 0 load", "to themselves"),
        (Machine(missing=("nvmlDeviceGetTotalEnergyConsumption",)), {}, "GPU 0 energy counter", "a whole GPU"),
        (Machine(missing=("nvmlDeviceGetMigMode",)), {}, "GPU 0 MIG", "A100 or newer"),
        (Machine(missing=("nvmlGpmQueryDeviceSupport",)), {}, "GPU 0 utilisation counters", "Hopper or newer"),
        (Machine(missing=("nvmlDeviceGetHandleByIndex",)), {}, "GPU 0", "a user who may use it"),
        (Machine(), {"parameters": "RmProfilingAdminOnly: 1\n"}, "profiler counters", "run as root"),
        (Machine(), {"libraries": ALL | {"torch": None}}, "torch", r"install expertslice\[gpu\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_amiss_comes_with_advice(look, machine, options, subject, advice):
    found = look(machine, **options)
    assert re.search(advice, found[subject].advice)


@pytest.mark.parametrize("missing", sorted(Machine().answers))
def test_whatever_fails_the_rest_is_told(look, missing):
    found = look(Machine(missing=(missing,)), parameters=None)
    assert set(LIBRARIES) < set(found)
    assert "driver" in found
    assert "profiler counters" not in found


def test_this_machine_can_be_examined():
    assert {one.subject for one in examine()} >= set(LIBRARIES)
