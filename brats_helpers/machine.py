"""What this machine can do: the device, the precision that it gains from, its memory."""

import os
import platform
import re
import sys
from pathlib import Path

import torch


def choose_device(device: str) -> torch.device:
    """The device to work on: `auto` takes the GPU where a real operation on it succeeds, else the CPU.

    Raises:
        RuntimeError: the device asked for by name does not work.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and works(torch.device("cuda")) else "cpu")
    if not works(torch.device(device)):
        raise RuntimeError(f"device {device!r} does not compute here. Take -p device auto, or cpu.")
    return torch.device(device)


def works(device: torch.device) -> bool:
    """Whether one small convolution, forward and backward, succeeds on the device.

    Some GPUs are reported as available and fail at the first kernel (a P100 under current builds of torch).
    """
    try:
        layer = torch.nn.Conv2d(1, 1, 3).to(device)
        layer(torch.zeros(1, 1, 8, 8, device=device)).sum().backward()
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        return False
    return True


def choose_precision(device: torch.device) -> str:
    """`bf16`, `fp16` or `no`: what the device computes faster than float32 in.

    GPUs from Ampere on have bf16 and a T4 has fp16 only (torch says that it has bf16, by emulation).
    A CPU gains where it has instructions for bf16.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    fast = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in fast) else "no"


def set_deterministic(on: bool) -> None:
    """On a GPU, let every operation give the same result each time, or else the fastest choose themselves.

    Where an operation of the network has no such variant, torch names it in an error. A CPU is deterministic anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses; of no effect without
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


def used_memory_gib(device: torch.device) -> float:
    """Memory in GiB: on a GPU the most that tensors took at once since its statistics were reset, else the process's.

    On Linux that is what the process holds now without mapped files, such as the prepared patients, which are given up
    whenever somebody else needs the room; torch and the system's allocator keep most of what they once had. Elsewhere
    it is the most so far, files included, and 0 where nothing can be known (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if own := re.search(r"RssAnon:\s+(\d+) kB", status.read_text() if status.exists() else ""):
        return int(own[1]) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def watched() -> bool:
    """Whether a person looks on: in a notebook whose front end could ask for input, or at a terminal.

    papermill and nbval run notebooks without input.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if kernel := getattr(shell, "kernel", None):
        return kernel._allow_stdin
    return sys.stdout.isatty()


def describe(device: torch.device) -> dict[str, str | int | float]:
    """Facts of the machine for a person and for the manifest: device, precision, cores, memory in GiB, versions."""
    facts: dict[str, str | int | float] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "precision": choose_precision(device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if hasattr(os, "sysconf"):
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if device.type == "cuda":
        facts["device_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts["devices"] = torch.cuda.device_count()
    return facts
