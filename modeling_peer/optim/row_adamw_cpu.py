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
"""[`RowAdamW`] on a CPU, in C compiled for its processor: touched rows are read and written once, in one pass."""

from collections.abc import Iterable

import torch

from ..native_library import DTYPES, PREAMBLE, call, for_each_dtype, load_library


SOURCE = (
    PREAMBLE
    + r"""
#include <math.h>

/* How many rows ahead parameter and moments are prefetched. A row is 2 KB at d = 512 in float32. */
#define ROWS_AHEAD 2
/* Vectors of a gradient between two checks for a non-zero element. */
#define VECTORS_PER_LOOK 8
"""
    + for_each_dtype(r"""
struct NAME(coefficients) { SUM decay, first, second, second_kept, eps; };

/* The square root of each lane: a loop over an array, which compiles to one instruction. */
static inline VECTOR NAME(root)(VECTOR v) {
    SUM lanes[WIDTH];
    memcpy(lanes, &v, sizeof v);
    for (int lane = 0; lane < WIDTH; lane++) lanes[lane] = sizeof(SUM) == 4 ? sqrtf(lanes[lane]) : sqrt(lanes[lane]);
    memcpy(&v, lanes, sizeof v);
    return v;
}

/* The step on a vector of a row: its first moment, its second moment (unless the row has a single one: then v is
   null), and its elements. `divisor` is that of the whole row if v is null, otherwise the factor of √v. */
static inline void NAME(update)(ROW *x, SUM *m, SUM *v, const ROW *g, SUM rate, SUM divisor,
                                struct NAME(coefficients) c) {
    VECTOR gradient = LOAD(g), first, divisors = divisor - (VECTOR){};
    memcpy(&first, m, sizeof first);
    first += c.first * (gradient - first);
    memcpy(m, &first, sizeof first);
    if (v) {
        VECTOR second;
        memcpy(&second, v, sizeof second);
        second = c.second_kept * second + c.second * (gradient * gradient);
        memcpy(v, &second, sizeof second);
        divisors = divisors * NAME(root)(second) + c.eps;
    }
    STORE(x, c.decay * LOAD(x) - rate * (first / divisors));
}

static inline SUM NAME(mean_square)(const ROW *g, int64_t width) {
    VECTOR sums = {};
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) {
        VECTOR gradient = LOAD(g + i);
        sums += gradient * gradient;
    }
    SUM sum = 0;
    for (int lane = 0; lane < WIDTH; lane++) sum += sums[lane];
    for (; i < width; i++) sum += GET(g + i) * GET(g + i);
    return sum / width;
}

/* touched[n]: whether row n has a non-zero element. */
void NAME(touched_rows)(const ROW *gradient, uint8_t *touched, int64_t count, int64_t width, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < count; n++) {
        const ROW *g = gradient + n * width;
        int64_t i = 0;
        int found = 0;
        while (i + WIDTH <= width && !found) {
            words others = {};
            for (int j = 0; j < VECTORS_PER_LOOK && i + WIDTH <= width; j++, i += WIDTH)
                others |= (words)(LOAD(g + i) != (VECTOR){});
            for (int lane = 0; lane < LANES; lane++) found |= others[lane] != 0;
        }
        for (; i < width && !found; i++) found = GET(g + i) != 0;
        touched[n] = found;
    }
}

/* AdamW's step on `count` distinct rows of a table: on row rows[u] with row places[u] of the gradient. Each element
   has its own second moment, or each row a single one if it is `shared`. */
void NAME(adamw)(ROW *parameter, SUM *exp_avg, SUM *exp_avg_sq, int32_t *row_steps, const ROW *gradient,
                 const int64_t *rows, const int64_t *places, int64_t count, int64_t width, int64_t shared, double lr,
                 double beta1, double beta2, double eps, double weight_decay, int threads) {
    const struct NAME(coefficients) c = {1 - lr * weight_decay, 1 - beta1, 1 - beta2, beta2, eps};
    const double log_beta1 = log(beta1), log_beta2 = log(beta2);
    const int64_t vectors = width - width % WIDTH;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < count; u++) {
        const int64_t row = rows[u], ahead = rows[u + ROWS_AHEAD < count ? u + ROWS_AHEAD : u] * width;
        ROW *x = parameter + row * width;
        SUM *m = exp_avg + row * width, *v = shared ? 0 : exp_avg_sq + row * width;
        const ROW *g = gradient + places[u] * width;
        const int32_t step = ++row_steps[row];
        const SUM rate = lr / -expm1(step * log_beta1), root_correction = sqrt(-expm1(step * log_beta2));
        SUM divisor = 1 / root_correction;
        if (shared) {
            const SUM second = c.second_kept * exp_avg_sq[row] + c.second * NAME(mean_square)(g, width);
            exp_avg_sq[row] = second;
            divisor = (SUM)sqrt(second) * divisor + c.eps;
        }
        for (int64_t i = 0; i < vectors; i += WIDTH) {
            __builtin_prefetch(parameter + ahead + i, 1, 3);
            __builtin_prefetch(exp_avg + ahead + i, 1, 3);
            if (v) __builtin_prefetch(exp_avg_sq + ahead + i, 1, 3);
            NAME(update)(x + i, m + i, v ? v + i : 0, g + i, rate, divisor, c);
        }
        if (vectors < width) {
            const size_t rest = width - vectors;
            ROW last_x[WIDTH] = {}, last_g[WIDTH] = {};
            SUM last_m[WIDTH] = {}, last_v[WIDTH] = {};
            memcpy(last_x, x + vectors, rest * sizeof *x);
            memcpy(last_g, g + vectors, rest * sizeof *g);
            memcpy(last_m, m + vectors, rest * sizeof *m);
            if (v) memcpy(last_v, v + vectors, rest * sizeof *v);
            NAME(update)(last_x, last_m, v ? last_v : 0, last_g, rate, divisor, c);
            memcpy(x + vectors, last_x, rest * sizeof *x);
            memcpy(m + vectors, last_m, rest * sizeof *m);
            if (v) memcpy(v + vectors, last_v, rest * sizeof *v);
        }
    }
}
""")
)


def can_update(parameter: torch.Tensor, gradient: torch.Tensor, moments: Iterable[torch.Tensor] = ()) -> bool:
    """Whether these kernels run on a parameter, its gradient and its moments on this machine."""
    moments = list(moments)
    tensors = [parameter, gradient, *moments]
    sum_dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return (
        parameter.dtype in DTYPES
        and parameter.dtype == gradient.dtype
        and all(moment.dtype == sum_dtype for moment in moments)
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
        and load_library(SOURCE) is not None
    )


def touched_rows(gradient: torch.Tensor) -> torch.Tensor:
    """For each row of a gradient, whether it has a non-zero element: bool, `(num_rows,)`."""
    touched = torch.empty(len(gradient), dtype=torch.bool)
    _call("touched_rows", gradient.dtype, gradient, touched, *gradient.shape)
    return touched


def update_rows(
    parameter: torch.Tensor,
    state: dict[str, torch.Tensor],
    rows: torch.Tensor,
    gradient: torch.Tensor,
    places: torch.Tensor,
    group: dict,
) -> None:
    """Make AdamW's step on some rows, in place. Arguments as in `row_adamw.update_rows`."""
    (_, width), exp_avg_sq = parameter.shape, state["exp_avg_sq"]
    tensors = (parameter, state["exp_avg"], exp_avg_sq, state["row_steps"], gradient, rows, places)
    hyperparameters = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    _call(
        "adamw",
        parameter.dtype,
        *tensors,
        len(rows),
        width,
        exp_avg_sq.shape[1] != width,
        *map(float, hyperparameters),
    )
    # As torch's own optimizers do, so that a graph that saved the table does not run its backward with the moved one.
    torch.autograd.graph.increment_version(parameter)


def _call(name, dtype, *arguments):
    call(SOURCE, f"{name}_{DTYPES[dtype]}", *arguments)
