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
In a package of kernels, in place of the module of this name that compiles: loads what was compiled when the package was
built, for the processor at hand.
"""

import ctypes
import functools
import hashlib
from pathlib import Path

import torch


LIBRARIES = Path(__file__).parent / "libraries"


def library_name(source: str) -> str:
    """Name of the file that holds the compiled form of C source."""
    return f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.so"


@functools.cache
def load_library(source: str) -> ctypes.CDLL | None:
    """
    Return the compiled form of C source, `None` if the package was built without it.

    Of each library there is one for every set of instructions that torch distinguishes, named and compiled as torch's
    own kernels are, so what torch runs on here, this may use; and one for any processor, `DEFAULT`.

    Raises:
        `OSError`: if the library is damaged, or was linked to a newer C library than that of this system.
    """
    own = LIBRARIES / torch.backends.cpu.get_cpu_capability()
    path = (own if own.is_dir() else LIBRARIES / "DEFAULT") / library_name(source)
    return ctypes.CDLL(str(path)) if path.exists() else None


def missing_library_reason() -> str:
    """Why [`load_library`] returned `None`, a sentence."""
    return "this package of kernels was built without them."
