"""Memory of which only what was written takes space: a slot can be as long as the model's context, and mostly is not.

The operating system gives pages when they are first written. On Linux they are given back while the process goes on.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000
"""Linux: address space without a claim on memory; Python's module names it from 3.13 on."""


class SlotMemory:
    """A tensor of zeros of one shape; whole parts of it can be emptied again."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, huge_pages: bool) -> None:
        self.pages: mmap.mmap | None = None
        if device.type == "cpu" and sys.platform == "linux":
            num_numbers = torch.Size(shape).numel()
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            self.pages = mmap.mmap(-1, num_numbers * dtype.itemsize, flags=flags)
            with contextlib.suppress(OSError):  # a system without them
                self.pages.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
            self.tensor: Tensor = torch.frombuffer(self.pages, dtype=dtype, count=num_numbers).view(shape)
        else:
            # Elsewhere on a CPU untouched pages cost nothing either, but stay once touched; a GPU takes all at once.
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    def empty(self, part: Tensor) -> None:
        """Give the whole pages inside a contiguous part of the tensor back; what it held is lost."""
        assert part.is_contiguous() and part.untyped_storage().data_ptr() == self.tensor.untyped_storage().data_ptr()
        if self.pages is None:
            return
        start = (part.storage_offset() - self.tensor.storage_offset()) * part.itemsize
        end = start + part.numel() * part.itemsize
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self.pages.madvise(mmap.MADV_DONTNEED, start, end - start)
