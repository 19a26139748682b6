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
C kernels that are compiled on the user's machine on first use, and kept in a cache.

A checkpoint that is loaded with `trust_remote_code=True` brings this file along. Compilation can be switched off for
the whole process by the environment variable `MODELING_PEER_COMPILE_KERNELS=0`, and for one model by
`expert_kernels="torch"` in its configuration; the notice that the first compilation prints names both. Where the user
names a package of kernels that are compiled already, nothing is compiled (see `kernel_package.py`).
"""

import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants
from transformers.utils import logging

from .kernel_package import PACKAGE_VARIABLE, packaged_library


logger = logging.get_logger(__name__)

COMPILE_VARIABLE = "MODELING_PEER_COMPILE_KERNELS"

# For any processor; what a compiler is told of one comes on top.
PORTABLE_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fPIC")

COMPILER_FLAGS = (*PORTABLE_FLAGS, "-march=native")


# Cached for the life of the process, as the process keeps a loaded library anyway: dlopen'd code that may be running
# cannot be unloaded. What is found out once, that there is no compiler for one, is not tried again at every forward.
@functools.cache
def load_library(source: str) -> ctypes.CDLL | None:
    """
    Return the compiled form of C source: that of the package of kernels which the user named, see
    [`packaged_library`]; without one, compile it unless this compiler has compiled it for this processor before.

    Compiled libraries are kept in `$HF_HOME/modeling_peer`, or in a folder of this user's own below the temporary
    directory where that one cannot be written or cannot hold code that runs.

    Returns:
        `ctypes.CDLL` or `None`: `None` if `MODELING_PEER_COMPILE_KERNELS=0` is set, and, after a notice, if there is
        no compiler that works.

    Raises:
        `ImportError`, `ValueError` or `RuntimeError`: if the user named a package that cannot be used here.
    """
    packaged = packaged_library(source)
    if packaged is not None:
        return packaged
    if is_compilation_off():
        return None
    try:
        compiler = compiler_command()
        version = _run([*compiler, "--version"])
        key = "\0".join([source, *compiler, *COMPILER_FLAGS, version, _processor()])
        return _open(compiler, source, hashlib.sha256(key.encode()).hexdigest()[:32])
    # ValueError: CC cannot be parsed. NotImplementedError: no folder has locks.
    except (OSError, ValueError, NotImplementedError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            f"PEER runs on PyTorch operations, several times slower than with C kernels, which could not be compiled: "
            f"{reason[0] if reason else repr(error)}. Install gcc, or set the environment variable CC to a compiler "
            f"that supports OpenMP, or {PACKAGE_VARIABLE} to a package of compiled kernels. {COMPILE_VARIABLE}=0 "
            "switches compilation, and this notice, off."
        )
        return None


def is_compilation_off() -> bool:
    """
    Whether the environment forbids C kernels: `MODELING_PEER_COMPILE_KERNELS` is set, and not to 1, on, yes or true.
    """
    return (os.environ.get(COMPILE_VARIABLE) or "1").upper() not in constants.ENV_VARS_TRUE_VALUES


def missing_library_reason() -> str:
    """Why [`load_library`] returned `None`, a sentence."""
    if is_compilation_off():
        return f"the environment variable {COMPILE_VARIABLE}={os.environ[COMPILE_VARIABLE]} switches C kernels off."
    return "there is no C compiler that works."


def _run(command):
    # Messages in English: `_open` looks for that of a full disk.
    english = os.environ | {"LC_ALL": "C"}
    return subprocess.run(
        command, capture_output=True, check=True, text=True, encoding="utf-8", errors="replace", env=english
    ).stdout


def compiler_command() -> list[str]:
    """The compiler that the environment names, `cc` if it names none."""
    if sys.platform == "win32":
        raise OSError("C kernels are for Linux and macOS")
    try:
        return shlex.split(os.environ.get("CC") or "cc")
    except ValueError as error:
        raise ValueError(f"the environment variable CC={os.environ['CC']!r} is no command: {error}") from None


def _processor():
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kinds)})])


def _open(compiler, source, key):
    try:
        return _load_from(_shared_folder(), compiler, source, key)
    except subprocess.CalledProcessError as error:
        if not any(os.strerror(code) in error.stderr for code in (errno.ENOSPC, errno.EDQUOT)):
            raise  # a compiler that does not work would fail in the other folder too
    except FileNotFoundError as error:
        if error.filename == compiler[0]:
            raise
    except (OSError, NotImplementedError):
        pass
    # The folder cannot be written, is full, has no locks, or is mounted `noexec`.
    return _load_from(_own_folder(), compiler, source, key)


def _load_from(folder, compiler, source, key):
    return ctypes.CDLL(str(_intact(folder, key) or _build(compiler, source, folder, key)))


def _shared_folder():
    folder = Path(constants.HF_HOME) / "modeling_peer"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _own_folder():
    """A folder where nobody but this user can put code."""
    own = Path(tempfile.gettempdir()) / f"modeling_peer-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid() or own.stat().st_mode & 0o077:
        raise OSError(f"{own} is not this user's alone: remove it, or set HF_HOME to a folder that can be written")
    return own


def _intact(folder, key):
    """The undamaged library of this key, `None` if there is none. Loading a damaged one could end the process."""
    return next((path for path in folder.glob(f"{key}-*.so") if _is_intact(path, key)), None)


def _is_intact(path, key):
    """Whether a file holds what its name says it was compiled with: a full disk or a power failure may have cut it."""
    try:
        return path.name == _file_name(key, path.read_bytes())
    except OSError:  # another process has removed it
        return False


def _file_name(key, library):
    return f"{key}-{hashlib.sha256(library).hexdigest()[:32]}.so"


def _build(compiler, source, folder, key):
    """Compile a library. Of several processes only one does, and none sees an incomplete file."""
    with FileLock(folder / "lock"):
        built = _intact(folder, key)
        if built is not None:
            return built
        logger.warning_once(
            f"PEER compiles C kernels for this processor with `{shlex.join(compiler)}`, and keeps them in {folder}. "
            f"To run PyTorch operations instead, set the environment variable {COMPILE_VARIABLE}=0, or in a model's "
            'configuration `expert_kernels="torch"` for that model alone.'
        )
        # Damaged libraries, and what killed compilations left behind: under the lock no other compilation is running.
        for damaged in folder.glob(f"{key}*.so"):
            damaged.unlink()
        for leftover in folder.glob("build-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as workplace:
            linked = compile_library(compiler, COMPILER_FLAGS, source, Path(workplace))
            path = folder / _file_name(key, linked.read_bytes())
            with linked.open("r+b") as file:
                os.fsync(file.fileno())  # or its name may be on the disk before its content
            os.replace(linked, path)
    return path


def compile_library(compiler: list[str], flags: Collection[str], source: str, workplace: Path) -> Path:
    """Compile C source in an empty folder, and return the library there."""
    code, compiled, linked = (workplace / name for name in ("kernels.c", "kernels.o", "kernels.so"))
    code.write_text(source, encoding="utf-8")
    _run([*compiler, *flags, "-c", str(code), "-o", str(compiled)])
    # Linked without OpenMP: its functions are found in the runtime that torch has loaded, not in a second one.
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    _run([*compiler, "-shared", *undefined, str(compiled), "-o", str(linked)])
    return linked
