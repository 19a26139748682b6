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
C kernels that are compiled on the user's machine on first use, kept in a cache, and called through ctypes.

Kernels have a plain C interface: no header of torch or Python is needed, and compiled kernels keep working when either
is upgraded. They run on the OpenMP threads that torch has already started.

A checkpoint that is loaded with `trust_remote_code=True` brings this file along. Compilation can be switched off for
the whole process by the environment variable `MODELING_PEER_COMPILE_KERNELS=0`, and for one model by
`expert_kernels="torch"` in its configuration; the notice that the first compilation prints names both.
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

import torch
from filelock import FileLock
from huggingface_hub import constants
from transformers.utils import logging


logger = logging.get_logger(__name__)

COMPILE_VARIABLE = "MODELING_PEER_COMPILE_KERNELS"

COMPILER_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fPIC")

# What the sources share. A vector is as wide as the processor's registers; it is loaded and stored by memcpy, which
# compiles to one instruction and requires no alignment.
PREAMBLE = r"""
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / 4)

typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef double doubles __attribute__((vector_size(VECTOR_BYTES)));

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline words select_words(ints mask, words a, words b) { return ((words)mask & a) | (~(words)mask & b); }

static inline floats load_float32(const float *p) { floats v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float32(float *p, floats v) { memcpy(p, &v, sizeof v); }
static inline doubles load_float64(const double *p) { doubles v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float64(double *p, doubles v) { memcpy(p, &v, sizeof v); }
static inline float get_float32(const float *p) { return *p; }
static inline void put_float32(float *p, float x) { *p = x; }
static inline double get_float64(const double *p) { return *p; }
static inline void put_float64(double *p, double x) { *p = x; }

/* bfloat16: the upper half of a float32, rounded to the nearest, ties to even; NaN stays NaN. */
static inline words load_halves(const uint16_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, words);
}
static inline void store_halves(uint16_t *p, words v) {
    halves h = __builtin_convertvector(v, halves);
    memcpy(p, &h, sizeof h);
}
static inline floats load_bfloat16(const uint16_t *p) { return (floats)(load_halves(p) << 16); }
static inline void store_bfloat16(uint16_t *p, floats v) {
    words bits = (words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store_halves(p, select_words(v == v, rounded, (bits >> 16) | 0x40));
}
static inline float get_bfloat16(const uint16_t *p) { return bits_to_float((uint32_t)*p << 16); }
static inline void put_bfloat16(uint16_t *p, float x) {
    uint32_t bits = float_to_bits(x);
    *p = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

/* float16: multiplying by 2^112 shifts the exponents, which handles subnormal numbers too. */
static inline floats load_float16(const uint16_t *p) {
    words bits = load_halves(p), magnitude = (bits & 0x7fff) << 13;
    words finite = (words)((floats)magnitude * 0x1p112f), special = magnitude | 0x7f800000;
    return (floats)(((bits & 0x8000) << 16) | select_words((ints)magnitude >= 0x0f800000, special, finite));
}
static inline words round_to_float16(words bits) {
    words sign = bits & 0x80000000, magnitude = bits ^ sign;
    words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    words subnormal = (words)((floats)magnitude + 0.5f) - 0x3f000000;
    words infinite = select_words((ints)magnitude > 0x7f800000, magnitude * 0 + 0x7e00, magnitude * 0 + 0x7c00);
    words rounded = select_words((ints)magnitude < (113 << 23), subnormal, normal);
    return select_words((ints)magnitude >= (143 << 23), infinite, rounded) | (sign >> 16);
}
static inline void store_float16(uint16_t *p, floats v) { store_halves(p, round_to_float16((words)v)); }
static inline float get_float16(const uint16_t *p) {
    uint16_t lanes[LANES] = {*p};
    return load_float16(lanes)[0];
}
static inline void put_float16(uint16_t *p, float x) { *p = round_to_float16((words){float_to_bits(x)})[0]; }
"""

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def for_each_dtype(body: str) -> str:
    """
    C source that defines the functions of `body` once for each dtype of a table.

    In `body`, `NAME(f)` becomes `f_float32` and so on; `ROW` is the type of an element in memory; `SUM` and `VECTOR`
    are the type in which sums are accumulated and a register of them, with `WIDTH` lanes; `LOAD`, `STORE`, `GET` and
    `PUT` convert between the two.
    """
    types = {
        "float32": ("float", "float", "floats"),
        "float64": ("double", "double", "doubles"),
        "bfloat16": ("uint16_t", "float", "floats"),
        "float16": ("uint16_t", "float", "floats"),
    }
    parts = []
    for dtype, (row, sum_type, vector) in types.items():
        macros = {"NAME(f)": f"f##_{dtype}", "ROW": row, "SUM": sum_type, "VECTOR": vector}
        macros |= {"WIDTH": f"(VECTOR_BYTES / (int)sizeof({sum_type}))"}
        macros |= {name.upper(): f"{name}_{dtype}" for name in ("load", "store", "get", "put")}
        parts += [f"#define {name} {value}" for name, value in macros.items()]
        parts += [body] + [f"#undef {name.partition('(')[0]}" for name in macros]
    return "\n".join(parts)


# Cached for the life of the process, as the process keeps a loaded library anyway: dlopen'd code that may be running
# cannot be unloaded. What is found out once, that there is no compiler for one, is not tried again at every forward.
@functools.cache
def load_library(source: str) -> ctypes.CDLL | None:
    """
    Return the compiled form of C source, compiling it unless this compiler has compiled it for this processor before.

    Compiled libraries are kept in `$HF_HOME/modeling_peer`, or in a folder of this user's own below the temporary
    directory where that one cannot be written or cannot hold code that runs.

    Returns:
        `ctypes.CDLL` or `None`: `None` if `MODELING_PEER_COMPILE_KERNELS=0` is set, and, after a notice, if there is
        no compiler that works.
    """
    if is_compilation_off():
        return None
    try:
        compiler = _compiler()
        version = _run([*compiler, "--version"])
        key = "\0".join([source, *compiler, *COMPILER_FLAGS, version, _processor()])
        return _open(compiler, source, hashlib.sha256(key.encode()).hexdigest()[:32])
    # ValueError: CC cannot be parsed. NotImplementedError: no folder has locks.
    except (OSError, ValueError, NotImplementedError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            f"PEER runs on PyTorch operations, several times slower than with C kernels, which could not be compiled: "
            f"{reason[0] if reason else repr(error)}. Install gcc, or set the environment variable CC to a compiler "
            f"that supports OpenMP. {COMPILE_VARIABLE}=0 switches compilation, and this notice, off."
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


def _compiler():
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
            linked = _compile(compiler, source, Path(workplace))
            path = folder / _file_name(key, linked.read_bytes())
            with linked.open("r+b") as file:
                os.fsync(file.fileno())  # or its name may be on the disk before its content
            os.replace(linked, path)
    return path


def _compile(compiler, source, workplace):
    code, compiled, linked = (workplace / name for name in ("kernels.c", "kernels.o", "kernels.so"))
    code.write_text(source, encoding="utf-8")
    _run([*compiler, *COMPILER_FLAGS, "-c", str(code), "-o", str(compiled)])
    # Linked without OpenMP: its functions are found in the runtime that torch has loaded, not in a second one.
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    _run([*compiler, "-shared", *undefined, str(compiled), "-o", str(linked)])
    return linked


# The process that imported this module. A child that it forks has another id, and none of its OpenMP threads.
_PROCESS = os.getpid()


def num_threads() -> int:
    """
    Number of threads for a kernel: torch's, but 1 in a forked process, which would wait for ever for its parent's.
    """
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def call(source: str, name: str, *arguments: torch.Tensor | int | float | None) -> int:
    """
    Call a function of a library, which takes the number of threads last.

    Args:
        source (`str`): C source of the library.
        name (`str`): Name of the function.
        arguments (`torch.Tensor`, `int`, `float` or `None`): Tensors are passed by address, contiguous as they are;
            integers as int64, floats as double, `None` as NULL. C trusts them: see [`check_tensor`].

    Raises:
        `RuntimeError`: if the library cannot be compiled here, or a tensor has no memory.
        `TypeError`: for a tensor subclass that handles operators itself: only it knows what its memory holds.
    """
    library = load_library(source)
    if library is None:
        raise RuntimeError(f"`cpu` kernels were chosen elsewhere and cannot run here: {missing_library_reason()}")
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return function(*map(_argument, arguments), ctypes.c_int(num_threads()))


def _argument(value):
    if isinstance(value, torch.Tensor):
        address = value.data_ptr()
        if not address or type(value) is not torch.Tensor:
            _check_has_memory(value)
        return ctypes.c_void_p(address)
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def _check_has_memory(tensor):
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"C kernels take plain tensors, got a {type(tensor).__name__}.")
    if tensor.numel() and not tensor.data_ptr():
        raise RuntimeError(f"A tensor of shape {tuple(tensor.shape)} has no memory: it was freed, or is fake.")


def check_in_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise `ValueError`, naming the argument, if a tensor is not in the memory that C reads."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise ValueError(f"`{name}` must be a strided tensor on the CPU, got {tensor.layout} on {tensor.device}.")


def check_tensor(name: str, tensor: torch.Tensor, num_dimensions: int, dtypes: Collection[torch.dtype]) -> None:
    """Raise `ValueError`, naming the argument, if C cannot read a tensor: strided, on the CPU, and of these dtypes."""
    check_in_memory(name, tensor)
    if tensor.dtype not in dtypes:
        raise ValueError(f"`{name}` must be of dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}.")
    if tensor.dim() != num_dimensions:
        raise ValueError(f"`{name}` must have {num_dimensions} dimensions, got shape {tuple(tensor.shape)}.")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise `ValueError`, naming the argument, if a tensor is not of a shape; `meaning` names its sizes."""
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must be of shape {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}.")


def refuse_index(indices: torch.Tensor, num_rows: int | str) -> None:
    """Raise `IndexError` for expert indices one of which is negative or not below `num_rows`."""
    least, most = (int(bound) for bound in indices.aminmax())
    found = least if least < 0 else most
    raise IndexError(f"An expert index must be at least 0 and below the number of experts {num_rows}, got {found}.")
