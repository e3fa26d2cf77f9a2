"""What this machine can do: the device, the precision that it gains from, its memory."""

import os
import platform

import torch


def choose_device(device: str) -> torch.device:
    """The device to work on: `auto` takes the first GPU on which a real operation succeeds, else the CPU.

    Some GPUs are reported as available and fail at the first kernel (a P100 under current builds
    of torch), so one small convolution decides.

    Raises:
        RuntimeError: a device that was asked for by name does not work.
    """
    if device != "auto":
        _try(torch.device(device))
        return torch.device(device)
    if torch.cuda.is_available():
        try:
            _try(torch.device("cuda"))
            return torch.device("cuda")
        except RuntimeError:
            pass
    return torch.device("cpu")


def _try(device: torch.device) -> None:
    layer = torch.nn.Conv2d(1, 1, 3).to(device)
    layer(torch.zeros(1, 1, 8, 8, device=device)).sum().backward()


def choose_precision(device: torch.device) -> str:
    """`bf16`, `fp16` or `no`: what the device computes faster than float32 in.

    GPUs from Ampere on have bf16 and a T4 has fp16 only (torch says that it has bf16, by emulation).
    A CPU gains where it has instructions for bf16.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    fast = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in fast) else "no"


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
