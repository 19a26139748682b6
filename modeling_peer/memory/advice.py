# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Advice to the operating system about memory that is read and written by rows. If it takes none, nothing changes."""

import ctypes
import mmap
import sys

import torch


# Huge pages are 2 MB: less memory than a few of them is not worth a system call.
LEAST_BYTES = 2**23


def _advise(tensor, advice):
    size = tensor.nbytes
    # A tensor subclass, quantized or sharded, may have no memory of its own.
    has_memory = tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if sys.platform != "linux" or not has_memory or size < LEAST_BYTES:
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
    return tensor


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """
    Let newly allocated memory have pages of 2 MB: there are fewer page faults when it is first written, and fewer TLB
    misses from then on. Return the tensor.
    """
    return _advise(tensor, mmap.MADV_HUGEPAGE) if hasattr(mmap, "MADV_HUGEPAGE") else tensor


def advise_random_access(tensor: torch.Tensor) -> torch.Tensor:
    """Let a read of a row of a tensor that is mapped from a file load that row alone. Return the tensor."""
    return _advise(tensor, mmap.MADV_RANDOM)


def advise_whole_access(tensor: torch.Tensor) -> torch.Tensor:
    """Undo [`advise_random_access`], before all of a tensor is read. Return the tensor."""
    return _advise(tensor, mmap.MADV_NORMAL)
