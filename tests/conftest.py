"""Where there is no CUDA device, Triton kernels run in its interpreter; that must be set before triton is imported."""

import ctypes
import os


def cuda_is_there() -> bool:
    """Return whether the driver finds a device, without importing torch."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


if not cuda_is_there():
    os.environ.setdefault("TRITON_INTERPRET", "1")
