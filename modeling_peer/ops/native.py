# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kernels in C: compiled on the user's machine on first use, kept in a cache, and called through ctypes.

The sources in `csrc` are one library with a plain C interface: no header of torch or Python is needed, and a compiled
library keeps working when either is upgraded. Its functions run on the OpenMP threads that torch has already started.
The environment variable `MODELING_PEER_COMPILE_KERNELS=0` switches compilation off for the whole process, and
`expert_kernels="torch"` in a configuration keeps one model from using it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from transformers.utils import logging


logger = logging.get_logger(__name__)

COMPILE_VARIABLE = "MODELING_PEER_COMPILE_KERNELS"

COMPILER_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fPIC", "-march=native")

SOURCES = Path(__file__).parent / "csrc"

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# The process that imported this module. A child that it forks has another id, and none of its OpenMP threads.
_PROCESS = os.getpid()


# Cached for the life of the process: dlopen'd code that may be running cannot be unloaded, and a missing compiler is
# not searched for again in every forward pass.
@functools.cache
def load_library(sources: Path = SOURCES) -> ctypes.CDLL | None:
    """
    Return the library compiled from the C files of a folder. It is kept in `$HF_HOME/modeling_peer` for this compiler
    and processor. If others could put code there, or the folder cannot be used, it is kept in `~/.modeling_peer`,
    and otherwise compiled by each process. Returns `None` if `MODELING_PEER_COMPILE_KERNELS` is set to anything but 1,
    on, yes or true, and, after a warning, if no compiler works or every folder is open to others.
    """
    if (os.environ.get(COMPILE_VARIABLE) or "1").upper() not in constants.ENV_VARS_TRUE_VALUES:
        return None
    try:
        compiler = compiler_command()
        content = [file.name + file.read_text(encoding="utf-8") for file in sorted(sources.iterdir())]
        key = "\0".join([*content, *compiler, *COMPILER_FLAGS, _run([*compiler, "--version"]), _processor()])
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        for parent, of_package in ((constants.HF_HOME, "modeling_peer"), (os.path.expanduser("~"), ".modeling_peer")):
            # The folder cannot be written, is open to others, is full, has no locks, or is mounted `noexec`.
            with contextlib.suppress(OSError, NotImplementedError, subprocess.CalledProcessError):
                folder = _private_folder(Path(parent, of_package))
                return ctypes.CDLL(str(_find(folder, name) or _build(compiler, sources, folder, name)))
        with tempfile.TemporaryDirectory() as workplace:
            return ctypes.CDLL(str(_compile(compiler, sources, _private_folder(Path(workplace)))))
    # ValueError: CC cannot be parsed.
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            f"PEER runs on PyTorch operations, several times slower than with C kernels, which could not be compiled: "
            f"{reason[0] if reason else repr(error)}. Install gcc, or set the environment variable CC to a compiler "
            f"that supports OpenMP. {COMPILE_VARIABLE}=0 switches compilation, and this notice, off."
        )
        return None


def _private_folder(folder):
    """
    Make a folder, and return its path without links, so that nobody can lead it elsewhere later. Raises
    `PermissionError` if others could put code there: if it or a folder above belongs to them or is open to them.
    """
    if not folder.is_absolute():
        raise PermissionError(f"{folder} depends on where a process runs")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    real = folder.resolve(strict=True)
    # From the root down: whoever cannot write to a folder that was looked at cannot exchange the next one.
    for each in (*reversed(real.parents), real):
        status = each.lstat()  # what was a folder may have become a link meanwhile
        # In a sticky folder such as /tmp, nobody can rename what belongs to others.
        is_open = status.st_mode & 0o022 and (each == real or not status.st_mode & stat.S_ISVTX)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.getuid()) or is_open:
            raise PermissionError(f"others could put code in {folder}: {each} belongs to them or is open to them")
        if status.st_uid == os.getuid() and not status.st_mode & 0o077:
            break  # nobody else reaches what is below
    return real


def _find(folder, name):
    """
    Find the library `name` in a private folder, and check its content, as mapping a damaged file ends the process. A
    damaged file is deleted, and so is one that others could have written while the folder was open to them.
    """
    for path in folder.glob(f"{name}-*.so"):
        status = path.lstat()
        is_own = stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022
        if is_own and path.stem == f"{name}-{_digest(path)}":
            return path
        path.unlink()
    return None


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def compiler_command() -> list[str]:
    """Return the compiler that the environment variable `CC` names, or `cc`."""
    if sys.platform == "win32":
        raise OSError("C kernels are for Linux and macOS")
    return shlex.split(os.environ.get("CC") or "cc")


def _run(command, workplace=None):
    """Run a compiler in English, in a folder that nobody else can write to, with its temporary files there."""
    environment = os.environ | {"LC_ALL": "C"} | ({"TMPDIR": str(workplace)} if workplace else {})
    options = {"cwd": workplace, "env": environment, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run(command, capture_output=True, check=True, text=True, **options).stdout


def _processor():
    """What `-march=native` depends on."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kinds)})])


def _build(compiler, sources, folder, name):
    """Compile a library and keep it. Only one of several processes does so, and none sees an incomplete file."""
    # Not forever: whoever could read the lock while the folder was open to others may hold it.
    with FileLock(folder / "lock", timeout=120, mode=0o600), tempfile.TemporaryDirectory(dir=folder) as workplace:
        if found := _find(folder, name):
            return found
        logger.warning_once(
            f"PEER compiles C kernels for this processor with `{shlex.join(compiler)}`, and keeps them in "
            f'{folder}. {COMPILE_VARIABLE}=0 in the environment, or `expert_kernels="torch"` in the '
            "configuration of a model, runs PyTorch operations instead."
        )
        part = _compile(compiler, sources, Path(workplace))
        part.chmod(0o700)  # whatever the umask
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # otherwise its name may reach the disk before its content
        return part.replace(folder / f"{name}-{_digest(part)}.so")


def _compile(compiler, sources, workplace):
    """Compile the C files of a folder, several at a time, into an empty one, and return the library there."""
    files, linked = sorted(sources.resolve().glob("*.c")), workplace / "kernels.so"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda file: _run([*compiler, *COMPILER_FLAGS, "-c", str(file)], workplace), files))
    # Linked without OpenMP: its functions are found in the runtime that torch has loaded, not in a second one.
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    compiled = [str(workplace / f"{file.stem}.o") for file in files]
    _run([*compiler, "-shared", *undefined, *compiled, "-o", str(linked)], workplace)
    return linked


def num_threads() -> int:
    """Number of threads of a kernel: torch's, or 1 in a forked process, which would wait forever for its parent's."""
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


@functools.cache
def _function(library, name):
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return function


def call(name: str, *arguments: torch.Tensor | int | float | None) -> int:
    """
    Call a function of the library; the number of threads is added as its last argument. Tensors, which must be
    contiguous, are passed by address, integers as int64, floats as double, and `None` as NULL. C does not check them:
    see [`check_tensor`]. Raises `RuntimeError` if a tensor is not on the CPU or has no memory of its own.
    """
    return _function(load_library(), name)(*map(_argument, arguments), ctypes.c_int(num_threads()))


def _argument(value):
    if isinstance(value, torch.Tensor):
        address = value.data_ptr()
        plain = type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        if not plain or not value.is_cpu or (value.numel() and not address):
            raise RuntimeError(f"C kernels take plain tensors in memory, got a {type(value)} on {value.device}.")
        return ctypes.c_void_p(address)
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def check_tensor(
    name: str, tensor: torch.Tensor, dtypes: Collection[torch.dtype] | None, shape: tuple[int, ...] | int
) -> None:
    """
    Raise `ValueError`, naming the argument, if C cannot read a tensor. It must be strided, on the CPU, of one of these
    dtypes (any if `None`), and of this shape or number of dimensions.
    """
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise ValueError(f"`{name}` must be a strided tensor on the CPU, got {tensor.layout} on {tensor.device}.")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise ValueError(f"`{name}` must be of dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}.")
    if (tensor.dim() if isinstance(shape, int) else tensor.shape) != shape:
        expected = f"have {shape} dimensions" if isinstance(shape, int) else f"be of shape {tuple(shape)}"
        raise ValueError(f"`{name}` must {expected}, got shape {tuple(tensor.shape)}.")


def refuse_index(indices: torch.Tensor, num_rows: int) -> None:
    """Raise `IndexError` for expert indices, one of which is negative or at least `num_rows`."""
    least, most = (int(bound) for bound in indices.aminmax())
    found = least if least < 0 else most
    raise IndexError(f"An expert index must be at least 0 and below the number of experts {num_rows}, got {found}.")
