"""A GPU that is not there: torch's device `cuda`, which computes on the host.

`pytest --simulate-gpu` gives it to the processes of the tests. It tells where
a program of the device differs from one of the host: which tensor lies where,
what a step waits for, and that backward runs in a thread of autograd's. It
says nothing of speed, of streams, or of NCCL.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig
import types

import pytest

NAME = "simulated_gpu_device"
HERE = pathlib.Path(__file__).parent
# What names the built device to the processes.
VARIABLE = "INTEGRATION_TESTS_SIMULATED_GPU"
# Marks what writes or reads torch's own files.
needs_storages = pytest.mark.skipif(
    VARIABLE in os.environ,
    reason="the simulated GPU has no storages that torch could pickle",
)
SYNC_DEBUG_MODES = {"default": 0, "warn": 1, "error": 2}


def build(folder):
    """Compiles the device, which takes half a minute.

    Args:
        folder: where it is to lie.

    Returns:
        The path of the built file.

    Raises:
        RuntimeError: if torch is built for a real GPU, or there is no
            compiler.
    """
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda or torch.version.hip:
        raise RuntimeError(
            "A GPU is simulated on a build of torch for the CPU only. "
            f"Received: torch {torch.__version__}"
        )
    target = pathlib.Path(folder) / f"{NAME}.so"
    includes = [
        *cpp_extension.include_paths(),
        sysconfig.get_path("include"),
    ]
    libraries = cpp_extension.library_paths()
    command = [
        os.environ.get("CXX", "g++"),
        *("-std=c++20", "-O1", "-fPIC", "-shared"),
        *(part for path in includes for part in ("-isystem", path)),
        *(f"-L{path}" for path in libraries),
        *(str(HERE / "device.cpp"), "-o", str(target)),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            f"Simulating a GPU needs a C++ compiler. Received: {command[0]}, "
            "which is not found. Set CXX to the name of one"
        ) from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"The simulated GPU was not compiled:\n{error.stderr}"
        ) from None
    return target


def install():
    """Gives this process the device that `VARIABLE` names.

    Before Keras is imported, which asks torch for its devices then.
    """
    import torch

    spec = importlib.util.spec_from_file_location(NAME, os.environ[VARIABLE])
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    device.ask_before_mixing(lambda name: _is_of_a_test())
    # A function of its own each: Dynamo has a list of torch's.
    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        name="simulated", major=9, minor=0
    )
    cuda.manual_seed = lambda seed: device.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: device.manual_seed(seed)
    cuda.set_sync_debug_mode = lambda mode: device.set_sync_debug_mode(
        SYNC_DEBUG_MODES[mode]
    )
    torch.Tensor.pin_memory = lambda x, device=None: x.clone()
    for name in ("__array__", "numpy"):
        setattr(torch.Tensor, name, _on_host(getattr(torch.Tensor, name)))


def _on_host(function):
    """As the function, of tensors of the GPU too where a test calls it."""

    def wrapped(x, *args, **kwargs):
        if x.is_cuda and _is_of_a_test():
            x = x.detach().cpu()
        return function(x, *args, **kwargs)

    return wrapped


def _is_of_a_test():
    """Whether what torch does now is a test's own, not the program's.

    Tests of numbers are written for the host: they compare with its tensors.
    Autograd's thread, which has no frames, has its tensors from before.
    """
    packages = sys.modules["numpy"], sys.modules["torch"]
    libraries = *(package.__path__[0] for package in packages), str(HERE), "<"
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        # The table of torch functions passes on what a test's line has called.
        is_between = frame.f_code.co_name == "__torch_function__"
        if not is_between and not path.startswith(libraries):
            return path.startswith(str(HERE.parent))
        frame = frame.f_back
    return True
