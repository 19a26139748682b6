# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Memory that is read and written by rows: advice to the operating system. Where it takes none, nothing changes.
"""

import ctypes
import functools
import mmap
import sys

import torch


# Huge pages are 2 MB: less memory than a few of them is not worth a system call.
LEAST_BYTES = 2**23


@functools.cache  # a handle of the process itself
def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _advise(tensor, advice):
    size = tensor.numel() * tensor.element_size()
    # A tensor subclass, quantized or sharded, may have no memory of its own.
    has_memory = tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if sys.platform != "linux" or not has_memory or size < LEAST_BYTES:
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
    return tensor


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """
    Let memory that was just allocated come in pages of 2 MB as it is first written: fewer page faults then, and fewer
    TLB misses from then on. Return the tensor.
    """
    return _advise(tensor, mmap.MADV_HUGEPAGE) if hasattr(mmap, "MADV_HUGEPAGE") else tensor


def advise_random_access(tensor: torch.Tensor) -> torch.Tensor:
    """
    Let a read of a row of a tensor that is mapped from a file load that row, not its neighbors. Return the tensor.
    """
    return _advise(tensor, mmap.MADV_RANDOM)


def advise_whole_access(tensor: torch.Tensor) -> torch.Tensor:
    """Undo [`advise_random_access`], before all of a tensor is read. Return the tensor."""
    return _advise(tensor, mmap.MADV_NORMAL)
