"""Environment that must stand before libraries load.

Where there is no CUDA device, Triton kernels run in its interpreter. Workers of the suite share the cores, so that
threads of BLAS only get in each other's way.
"""

import ctypes
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def cuda_is_there() -> bool:
    """Return whether the driver finds a device, without importing torch."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


if not cuda_is_there():
    os.environ.setdefault("TRITON_INTERPRET", "1")
