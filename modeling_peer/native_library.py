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
Compiles C on the user's machine, on first use, and keeps it.

Kernels have a plain C interface that ctypes calls: no header of torch or Python is needed, and what was compiled goes on
working when either is upgraded. They run on the OpenMP threads that torch has already started.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from transformers.utils import logging


logger = logging.get_logger(__name__)

COMPILER_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fPIC")

# What the sources share. A vector is as wide as the processor's registers; it is loaded and stored through memcpy, which
# compiles to one instruction and asks for no alignment.
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

/* bfloat16: the upper half of a float32, rounded to the nearest, ties to even; not a number stays one. */
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

/* float16: exponents are shifted by a product with 2^112, which makes subnormal numbers right too. */
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
    C that defines a body's functions once per dtype of a row of numbers: `NAME(f)` becomes `f_float32` and so on, `ROW` the
    type of a number in memory, `SUM` and `VECTOR` the type that sums are taken in and a register of them, `WIDTH` its
    lanes, `LOAD`, `STORE`, `GET` and `PUT` what goes between.
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


@functools.cache
def load_library(source: str) -> ctypes.CDLL | None:
    """
    The compiled form of C source, from the cache (`$HF_HOME/modeling_peer`) if this compiler has compiled it for this
    processor before. `None`, and a notice, if there is no compiler or it fails.
    """
    try:
        compiler = _compiler()
        version = _run([*compiler, "--version"])
        key = "\0".join([source, *compiler, *COMPILER_FLAGS, version, _processor()])
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        return ctypes.CDLL(str(_build(compiler, source, name)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            f"PEER runs on torch operations, several times slower than with a C compiler: {reason[0] if reason else error}. "
            "Install gcc, or name a compiler that has its OpenMP in the environment variable CC."
        )
        return None


def _run(command):
    done = subprocess.run(command, capture_output=True, check=True, text=True, encoding="utf-8", errors="replace")
    return done.stdout


def _compiler():
    if sys.platform == "win32":
        raise OSError("native kernels are for Linux and macOS")
    return shlex.split(os.environ.get("CC") or "cc")


def _processor():
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kinds)})])


def _build(compiler, source, name):
    """Compiles to a file of this name unless there is one. Of several processes one compiles; none sees a part of it."""
    folder = Path(constants.HF_HOME) / "modeling_peer"
    if (folder / name).exists():
        return folder / name
    folder = _writable(folder)
    with FileLock(folder / f"{name}.lock"), tempfile.TemporaryDirectory(dir=folder) as workplace:
        if (folder / name).exists():
            return folder / name
        code, compiled, linked = (Path(workplace) / name for name in ("kernels.c", "kernels.o", "kernels.so"))
        code.write_text(source, encoding="utf-8")
        _run([*compiler, *COMPILER_FLAGS, "-c", str(code), "-o", str(compiled)])
        # Linked without OpenMP: its functions are found in the runtime that torch has loaded, not in a second one.
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([*compiler, "-shared", *undefined, str(compiled), "-o", str(linked)])
        os.replace(linked, folder / name)
    return folder / name


def _writable(folder):
    """The folder, made if it can be, or else one of this user's own, where nobody else can put code."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    own = Path(tempfile.gettempdir()) / f"modeling_peer-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid() or own.stat().st_mode & 0o077:
        raise OSError(f"{own} is not this user's alone: remove it, or set HF_HOME to a folder that can be written")
    return own


_is_forked = False


def _note_fork():
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def num_threads() -> int:
    """Threads for a kernel: torch's, but one in a forked process, whose parent's OpenMP threads are not there."""
    return 1 if _is_forked else torch.get_num_threads()


def call(source: str, name: str, *arguments: torch.Tensor | int | float | None) -> int:
    """
    Calls a function of a library, which takes the number of threads last: tensors go by address, numbers as int64 or
    double. Raises `RuntimeError` if the library cannot be compiled here.
    """
    library = load_library(source)
    if library is None:
        raise RuntimeError("Native kernels were chosen elsewhere, and here there is no C compiler that works.")
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return function(*map(_argument, arguments), ctypes.c_int(num_threads()))


def _argument(value):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def refuse_index(indices: torch.Tensor, num_rows: int | str) -> None:
    """Raises `IndexError` for experts' numbers one of which is not below `num_rows`, or is negative."""
    least, most = (int(bound) for bound in indices.aminmax())
    found = least if least < 0 else most
    raise IndexError(f"An expert's number is at least 0 and below their number {num_rows}, got {found}.")
