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
"""What the operating system is told of memory that is read by rows. Where it does not listen, nothing changes."""

import ctypes
import functools
import mmap
import sys

import torch


# Huge pages are 2 MB: less memory than some of them is not worth a call.
LEAST_BYTES = 2**23


@functools.cache
def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _advise(tensor, advice):
    size = tensor.numel() * tensor.element_size()
    # A tensor of tensors, quantized or sharded, has no memory of its own.
    has_memory = tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if sys.platform != "linux" or not has_memory or size < LEAST_BYTES:
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
    return tensor


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """
    Memory that was just allocated comes in pages of 2 MB as it is first written: fewer interrupts then, fewer misses of
    the processor's table of pages ever after. Returns the tensor.
    """
    return _advise(tensor, mmap.MADV_HUGEPAGE) if hasattr(mmap, "MADV_HUGEPAGE") else tensor


def advise_random_access(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor mapped from a file, reading a row brings that row, not its neighbours. Returns the tensor."""
    return _advise(tensor, mmap.MADV_RANDOM)
