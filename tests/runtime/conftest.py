"""A device that exists on a fake clock alone: it runs steps in order, draws power and counts energy in ticks."""

import math
import random

import pytest

MS = 1_000_000
TICK_NS = 100 * MS
QUERY_NS = 2 * MS, 15 * MS


class FakeError(Exception):
    """Stands for pynvml.NVMLError."""

    def __str__(self):
        return type(self).__name__


class NotSupportedError(FakeError):
    pass


class NoPermissionError(FakeError):
    pass


class FunctionNotFoundError(FakeError):
    pass


class World:
    """Host clock and device: enqueued work runs back to back, and the device draws load or idle power."""

    def __init__(self, idle_w=100, load_w=600, start_ns=0):
        self.idle_w, self.load_w = idle_w, load_w
        self.now_ns = start_ns
        self.free_ns = 0
        self.busy = []
        self.slept = []

    def clock_ns(self):
        self.now_ns += 200
        return self.now_ns

    def sleep(self, seconds):
        self.slept.append((self.now_ns, seconds))
        self.now_ns += math.ceil(seconds * 1e9)

    def enqueue(self, device_ns, host_ns=5_000):
        self.now_ns += host_ns
        start, self.free_ns = max(self.now_ns, self.free_ns), max(self.now_ns, self.free_ns) + device_ns
        if self.busy and self.busy[-1][1] == start:
            self.busy[-1][1] = self.free_ns
        else:
            self.busy.append([start, self.free_ns])

    def fence(self):
        return Fence(self)

    def busy_ns(self, at_ns):
        return sum(min(end, at_ns) - min(start, at_ns) for start, end in self.busy)

    def energy_mj(self, at_ns):
        tick_ns = at_ns // TICK_NS * TICK_NS
        return int((self.idle_w * tick_ns + (self.load_w - self.idle_w) * self.busy_ns(tick_ns)) // MS) + 7


class Fence:
    def __init__(self, world):
        self.world, self.end_ns = world, world.free_ns

    def query(self):
        return self.world.now_ns >= self.end_ns

    def synchronize(self):
        self.world.now_ns = max(self.world.now_ns, self.end_ns)


class FakeNvml:
    """The functions of pynvml that are read; there are no setters, so that none can be called."""

    NVMLError = FakeError
    NVMLError_NotSupported, NVMLError_NoPermission, NVMLError_FunctionNotFound = (
        NotSupportedError,
        NoPermissionError,
        FunctionNotFoundError,
    )
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self, world):
        self.world = world
        self.random = random.Random(world.now_ns)
        self.fails = {}
        self.calls = []
        self.counter_mj = world.energy_mj
        self.reason_bits = 0b100

    def _answer(self, name, value=None):
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]
        return value() if callable(value) else value

    def nvmlInit(self):
        self._answer("nvmlInit")

    def nvmlShutdown(self):
        self._answer("nvmlShutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._answer("nvmlDeviceGetHandleByUUID", ("uuid", uuid))

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):
        return self._answer("nvmlDeviceGetHandleByPciBusId", ("pci", bus_id))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        # Queries last unevenly, and the value is of any moment within: the reader sees a tick late.
        begin_ns = self.world.now_ns
        self.world.now_ns += self.random.randint(*QUERY_NS)
        at_ns = self.random.randint(begin_ns, self.world.now_ns)
        return self._answer("nvmlDeviceGetTotalEnergyConsumption", lambda: self.counter_mj(at_ns))

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._answer("nvmlDeviceGetPowerUsage", self.world.load_w * 1000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return self._answer("nvmlDeviceGetEnforcedPowerLimit", 700_000)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        assert kind == self.NVML_CLOCK_SM
        mhz = (1400, 1980, 1980)[self.calls.count("nvmlDeviceGetClockInfo") % 3]
        return self._answer("nvmlDeviceGetClockInfo", mhz)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._answer("nvmlDeviceGetTemperature", 30 + self.calls.count("nvmlDeviceGetTemperature"))

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._answer("nvmlDeviceGetCurrentClocksEventReasons", self.reason_bits)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._answer("nvmlDeviceGetCurrentClocksThrottleReasons", 0b1000)


@pytest.fixture(scope="session")
def build():
    """Return the maker of a device with its NVML: laws draw many."""

    def make(**options):
        world = World(**options)
        return world, FakeNvml(world)

    return make


@pytest.fixture(scope="session")
def errors():
    """Return the faults: what a device lacks, what a user may not, what a driver does not know, and any other."""
    return {
        "lacks": NotSupportedError,
        "forbids": NoPermissionError,
        "unknown": FunctionNotFoundError,
        "other": FakeError,
    }


GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 48, "num_hidden_layers": 3}
FAMILIES = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16},
    "Olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "DeepseekV3": {**GROUPS, **LATENT, **DENSE_FIRST, "num_experts_per_tok": 3},
    "GptOss": {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


@pytest.fixture
def tiny_model():
    """Return the maker of a family's model, random weights large enough that experts matter."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def build(family, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        options = {**sizes, "num_key_value_heads": 2, "eos_token_id": None, **FAMILIES[family], **changes}
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options))
        model.set_experts_implementation("eager")
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.dim() > 1 or name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(weight, std=0.3)
        return model.eval().to(dtype).requires_grad_(False)

    return build
