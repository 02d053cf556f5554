"""Host memory from which an accelerator copies, and that is given back when it is freed."""

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import format_memory

M_MMAP_THRESHOLD = -3
"""Of `mallopt` in malloc.h: blocks from this size on are mapped one by one."""
LARGE_BYTES = 1 << 20


def allocate(size: int) -> Tensor:
    """Return `size` bytes of host memory, uint8, on pages of their own.

    `torch.empty(…, pin_memory=True)` rounds sizes up to a power of two, of which blocks of a model waste a third.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def return_freed_memory() -> None:
    """From now on, give the memory of each large tensor back to the system when it is freed.

    The C library of Linux otherwise keeps that of tensors below 32 MiB for later ones. If whole tensors and the parts
    that are kept of them alternate, the gaps are too small for the next whole one: the memory of the process grows by
    up to half of what it keeps.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if change is not None:
        change(M_MMAP_THRESHOLD, LARGE_BYTES)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a copy from host memory to a GPU is begun without waiting for it.

    From pageable memory a copy would wait until the GPU has computed what was queued before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # Allocated in torch's cache of pinned memory, which reuses it only once the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def pin(memory: Tensor, device: torch.device) -> Tensor:
    """Return memory of `allocate` such that copies to a GPU may run beside its computation; for other devices as it is.

    Raises:
        DiffSynthError: if the system does not let so much memory be pinned.
    """
    if device.type != "cuda":
        return memory
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    # In place, as torch.distributed pins the memory of its checkpoints.
    failed = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if failed:
        raise DiffSynthError(
            f"the system does not let {format_memory(memory.nbytes)} more of host memory be pinned (CUDA error {failed})",
            "lower `--blocks_to_swap`, or free host memory",
        )
    # Of the storage, which lives as long as any view of it.
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory
