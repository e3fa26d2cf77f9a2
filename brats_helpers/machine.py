"""The capabilities of this machine: device, precision, memory."""

import os
import platform
import re
import sys
from pathlib import Path

import torch


def choose_device(device: str) -> torch.device:
    """Return the device to use: `auto` takes the GPU if a real operation on it succeeds, else the CPU.

    Raises:
        RuntimeError: the named device is not supported, or does not work.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and works(torch.device("cuda")) else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        why = "Apple's GPUs are not supported; " if device.startswith("mps") else ""
        raise RuntimeError(f"device {device!r}: {why}expected auto, cpu, cuda or cuda:0. Take -p device auto, or cpu.")
    if not works(torch.device(device)):
        raise RuntimeError(f"device {device!r} does not compute here. Take -p device auto, or cpu.")
    return torch.device(device)


def works(device: torch.device) -> bool:
    """Whether one small convolution, forward and backward, succeeds on the device.

    Some GPUs are reported as available but fail at the first kernel (a P100 under current builds of torch).
    """
    try:
        layer = torch.nn.Conv2d(1, 1, 3).to(device)
        layer(torch.zeros(1, 1, 8, 8, device=device)).sum().backward()
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        return False
    return True


def choose_precision(device: torch.device) -> str:
    """Return `bf16`, `fp16` or `no`: the precision in which the device computes faster than in float32.

    GPUs from Ampere on have bf16; a T4 has only fp16 (torch reports bf16, which it emulates). A CPU is faster if it has
    instructions for bf16, which Linux lists.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "no"


def _cpu_flags(info: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The names of the processor's instruction sets; empty if the system does not list them as Linux does."""
    found = re.search(r"^flags\s*:(.*)$", info.read_text("utf-8") if info.exists() else "", re.MULTILINE)
    return set(found[1].split()) if found else set()


def set_deterministic(on: bool) -> None:
    """On a GPU, choose deterministic operations, or else the fastest ones.

    If an operation of the network has no deterministic variant, torch names it in an error. A CPU is always
    deterministic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


def used_memory_gib(device: torch.device) -> float:
    """Return memory in GiB: on a GPU the peak of all tensors since the last reset, else that of this process.

    On Linux this is the present memory without mapped files, such as the prepared patients, which the system drops when
    it needs memory. On other systems it is the peak so far, mapped files included; on Windows it is 0.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if own := re.search(r"RssAnon:\s+(\d+) kB", status.read_text("utf-8") if status.exists() else ""):
        return int(own[1]) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def describe(device: torch.device) -> dict[str, str | int | float]:
    """Return facts for people and the manifest: device, precision, cores, memory in GiB, versions."""
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
