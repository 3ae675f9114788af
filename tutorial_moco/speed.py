"""What makes training fast on the machine at hand: measured, chosen, and said.

Which number format pays differs by a factor of twenty between processors: bfloat16 doubles the speed where the processor
multiplies it (AVX512-BF16, AMX) and is emulated, very slowly, where it does not.
"""

import contextlib
import ctypes
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next step instead of giving it back to the system; True if it could.

    By default each large tensor is fresh memory from the kernel, which zeroes it page by page: a sixth of a step's time.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2  # malloc.h
    return all([mallopt(mmap_threshold, 1 << 30), mallopt(trim_threshold, (1 << 31) - 1), mallopt(top_pad, 64 << 20)])


def autocast(device: torch.device, dtype: torch.dtype):
    """Context in which convolutions and products are computed in ``dtype``."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def grad_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """For a loss whose small gradients float16 would round to 0; of the other formats, which reach as far as float32, idle."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


@contextlib.contextmanager
def products_in(dtype: torch.dtype):
    """Context in which float32 products may round their factors to bfloat16 if that is ``dtype``, and else are exact.

    For what autocast must leave in float32 because it needs more digits afterwards: logits, and the views' pixels. Sums
    stay float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_precision(encoder: nn.Module, view: torch.Tensor) -> torch.dtype:
    """float32 or bfloat16, whichever trains this encoder faster on this view's device (a second to measure).

    On a GPU nothing is measured: bfloat16 where its tensor cores multiply it (Ampere and newer).

    Args:
        view: float32 (B, 3, H, W); its first 128 images of 32 pixels, or as many pixels of larger ones, are used: of fewer,
            fixed costs hide the difference. The encoder's state is not changed.
    """
    if view.is_cuda:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    view = view[: max(4, 128 * 32**2 // view.shape[-1] ** 2)]
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for turn in range(6):  # in turns, so that what else happens on the machine meets both
        for dtype in best:
            if turn == 0 or best[dtype] < 5 * min(best.values()):  # else it is emulated, and each turn costs seconds
                best[dtype] = min(best[dtype], _training_seconds(encoder, view, dtype))
    encoder.load_state_dict(state)
    encoder.zero_grad(set_to_none=True)
    # A tie goes to float32: it is exact.
    return torch.bfloat16 if best[torch.bfloat16] < 0.9 * best[torch.float32] else torch.float32


def _training_seconds(encoder: nn.Module, view: torch.Tensor, dtype: torch.dtype) -> float:
    """Of one forward and backward pass."""
    synchronize(view.device)
    start = time.perf_counter()
    with autocast(view.device, dtype):
        loss = encoder(view).sum()
    loss.backward()
    synchronize(view.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Of a GPU an event that is over when all that it was told so far is done; None of a processor."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory_bytes`; on Linux also for the process's own memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held since `reset_peak_memory`: the GPU's, or the process's resident memory (images included).

    Since the process began where the system cannot restart the count (macOS); 0 where it keeps none (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory() -> int:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 16 << 30
