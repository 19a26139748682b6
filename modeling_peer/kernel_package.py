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
C kernels that are compiled already, for machines without a compiler: in a folder in the format of Hugging Face's
`kernels`, which `examples/build_kernels.py` makes.

The user names the folder in the environment, and not a configuration: a checkpoint must not say which code runs.
"""

import ctypes
import functools
import os
from pathlib import Path


PACKAGE_VARIABLE = "MODELING_PEER_KERNELS"


def packaged_library(source: str) -> ctypes.CDLL | None:
    """
    Return the compiled form of C source from the package that the environment variable `MODELING_PEER_KERNELS` names,
    `None` if it names none.

    A package has all kernels of one release, or is refused: of a layer whose kernels were there in part only, some
    calls would fail long after the kernels were chosen.

    Raises:
        `ImportError`: if `kernels` is not installed.
        `ValueError`: if there is no such folder, or it has nothing for this system.
        `RuntimeError`: if the package was built from other C source, or cannot be loaded.
    """
    folder = os.environ.get(PACKAGE_VARIABLE)
    if not folder:
        return None
    try:
        library = _load_package(folder).load_library(source)
    except OSError as error:  # damaged, or of a newer C library
        raise RuntimeError(f"{PACKAGE_VARIABLE}={folder} has kernels that cannot be loaded: {error}") from error
    if library is None:
        raise RuntimeError(
            f"{PACKAGE_VARIABLE}={folder} was built from the C source of another release of modeling_peer: build it "
            "again with examples/build_kernels.py of this one, or unset the variable."
        )
    return library


@functools.cache
def _load_package(folder):
    try:
        from kernels import get_local_kernel
    except ImportError as error:
        raise ImportError(
            f"{PACKAGE_VARIABLE}={folder} needs the package `kernels`: `pip install 'modeling-peer[kernels]'`, or "
            "`pip install kernels` where a checkpoint brought this code along."
        ) from error
    if not Path(folder).is_dir():
        raise ValueError(f"{PACKAGE_VARIABLE} must name a folder of kernels, got {folder!r}, which is none.")
    try:
        return get_local_kernel(Path(folder), backend="cpu")
    except FileNotFoundError as error:
        raise ValueError(f"{PACKAGE_VARIABLE}={folder} has no kernels for the CPU of this system: {error}") from error
