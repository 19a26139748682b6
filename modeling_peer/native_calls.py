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
What the C sources share, how their functions are called through ctypes, and checks of what C reads.

Kernels have a plain C interface: no header of torch or Python is needed, and compiled kernels keep working when either
is upgraded. They run on the OpenMP threads that torch has already started.
"""

import ctypes
import os
from collections.abc import Collection

import torch

from .native_library import load_library, missing_library_reason


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
        `RuntimeError`: if the library cannot be compiled here, or a tensor is not on the CPU or has no memory.
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
        if not address or not value.is_cpu or type(value) is not torch.Tensor:
            _check_has_memory(value)
        return ctypes.c_void_p(address)
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def _check_has_memory(tensor):
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"C kernels take plain tensors, got a {type(tensor).__name__}.")
    if not tensor.is_cpu:
        raise RuntimeError(f"C kernels take tensors on the CPU, got one on {tensor.device}.")
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
