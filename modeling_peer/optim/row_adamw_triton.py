# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
AdamW's step on rows of a table on a GPU, in Triton. `update_by_factors` sums the gradient of a row from its factors
and never writes it. Row and moments are read and written once.
"""

import math

import torch

from ..ops.gradient_factors import Factors
from ..ops.gradient_triton import with_partial_sums
from ..ops.triton_launch import DTYPES, MOST_ELEMENTS, can_run_on, launch, tl, triton


if triton is not None:
    from ..ops.gradient_triton import sum_group

    @triton.jit
    def _mix(x):
        """The finalizer of MurmurHash3, of 32 bits: uint32."""
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return x ^ (x >> 16)

    @triton.jit
    def random_bits(seed, row, step, columns):
        """32 random bits for each column of a row, as `random_bits` in stochastic_rounding.py has them: uint32."""
        of_row = _mix(_mix(seed.to(tl.uint32) + row.to(tl.uint32) * 0x9E3779B1) + step.to(tl.uint32) * 0x85EBCA77)
        return _mix(of_row + columns.to(tl.uint32) * 0xC2B2AE3D)

    @triton.jit
    def round_stochastically(values, bits, dtype: tl.constexpr):
        """Round float32 to bfloat16 or float16 as `round_stochastically` in stochastic_rounding.py does."""
        pattern = values.to(tl.uint32, bitcast=True)
        is_number = values == values
        if dtype == tl.bfloat16:
            rounded = tl.where(is_number, (pattern + (bits >> 16)) >> 16, (pattern >> 16) | 0x40)
        else:
            magnitude = pattern & 0x7FFFFFFF
            # Below 2^-14 numbers are 2^-24 apart.
            shifted = tl.abs(values) * 16777216.0 + (bits >> 19).to(tl.float32) * 0.0001220703125
            subnormal = tl.minimum(shifted, 2048.0).to(tl.uint32)
            normal = (magnitude - 0x38000000 + (bits >> 19)) >> 13
            rounded = tl.where(magnitude < 0x38800000, subnormal, normal)
            rounded = tl.where(magnitude < 0x47800000, rounded, 0x7C00)
            rounded = tl.where(is_number, rounded, 0x7E00) | ((pattern >> 16) & 0x8000)
        return rounded.to(tl.uint16).to(dtype, bitcast=True)

    @triton.jit
    def one_minus_exp(x):
        """`1 - exp(x)` for x <= 0, without the cancellation of two numbers close to 1."""
        series = 1.0 + x * 0.125
        for power in tl.static_range(7, 1, -1):
            series = 1.0 + x / power * series
        return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))

    @triton.jit(do_not_specialize=["seed"])
    def _step_row(
        parameter,
        exp_avg,
        exp_avg_sq,
        row_steps,
        rows,
        coefficients,
        sources,
        starts,
        tokens,
        partial_sums,
        rate,
        kept,
        first_weight,
        second_weight,
        second_kept,
        eps,
        log_beta1,
        log_beta2,
        seed,
        SHARED: tl.constexpr,
        SKIP_ZEROS: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """
        Make AdamW's step on the row of a group of assignments. The row has a second moment for each element, or a
        single one if SHARED. With SKIP_ZEROS, a row whose gradient is zero is left as it is.
        """
        group = tl.program_id(0)
        if tl.load(starts + group) == tl.load(starts + group + 1):
            return
        row = tl.load(rows + group).to(tl.int64)
        columns = tl.arange(0, COLUMNS)
        mask = columns < WIDTH
        gradient = sum_group(
            coefficients, sources, starts, tokens, partial_sums, group, columns, WIDTH, ROWS, COLUMNS, CHUNK
        )
        if (tl.max((gradient != 0).to(tl.int32)) == 0) & SKIP_ZEROS:
            return
        step = tl.load(row_steps + row) + 1
        elements = row * WIDTH + columns
        first = tl.load(exp_avg + elements, mask=mask, other=0.0)
        first += first_weight * (gradient - first)
        squares = gradient * gradient
        second_places = exp_avg_sq + elements
        second_mask = mask
        if SHARED:
            squares = tl.sum(squares) / WIDTH
            second_places = exp_avg_sq + row
            second_mask = None
        second = second_kept * tl.load(second_places, mask=second_mask) + second_weight * squares
        root_correction = tl.sqrt(one_minus_exp(step.to(tl.float32) * log_beta2))
        divisor = tl.sqrt(second) / root_correction + eps
        moved = tl.load(parameter + elements, mask=mask, other=0.0).to(tl.float32) * kept
        moved -= first * (rate / one_minus_exp(step.to(tl.float32) * log_beta1)) / divisor
        # All threads must have read the values that a row shares before one of them writes them.
        tl.debug_barrier()
        tl.store(row_steps + row, step)
        tl.store(exp_avg + elements, first, mask=mask)
        tl.store(second_places, second, mask=second_mask)
        dtype: tl.constexpr = parameter.dtype.element_ty
        if dtype == tl.float32:
            tl.store(parameter + elements, moved, mask=mask)
        else:
            rounded = round_stochastically(moved, random_bits(seed, row, step, columns), dtype)
            tl.store(parameter + elements, rounded, mask=mask)


def can_update(parameter: torch.Tensor, gradient: torch.Tensor | None, moments: tuple[torch.Tensor, ...] = ()) -> bool:
    """See `can_update` in row_adamw_cpu.py."""
    tensors = [parameter, *moments] if gradient is None else [parameter, *moments, gradient]
    return (
        can_run_on(parameter.device)
        and parameter.dtype in DTYPES
        and parameter.shape[1] <= MOST_ELEMENTS
        and (gradient is None or gradient.dtype in DTYPES)
        and all(moment.dtype == torch.float32 for moment in moments)
        and all(tensor.device == parameter.device and tensor.is_contiguous() for tensor in tensors)
    )


def update_rows(parameter, state, rows, gradient, places, group) -> None:
    """See `row_adamw.update_rows`."""
    starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    ones = torch.ones(len(rows), dtype=torch.float32, device=rows.device)
    _step(parameter, state, rows.int(), (ones, places.int(), starts, gradient), group, skip_zeros=False)


def update_by_factors(parameter, state, factors: Factors, group) -> None:
    """Make AdamW's step on the rows whose gradient is not zero, in place. Nothing waits for the GPU."""
    _step(parameter, state, factors.rows, factors.in_groups(), group, skip_zeros=True)


def _step(parameter, state, rows, factors, group, skip_zeros):
    exp_avg_sq, width, lr, seed = state["exp_avg_sq"], parameter.shape[1], group["lr"], group["rounding_seed"]
    factors, options = with_partial_sums(*factors)
    beta1, beta2 = group["betas"]
    log_beta1, log_beta2 = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    hyperparameters = (lr, 1 - lr * group["weight_decay"], 1 - beta1, 1 - beta2, beta2, group["eps"])
    launch(
        _step_row,
        (len(rows),),
        *(parameter, state["exp_avg"], exp_avg_sq, state["row_steps"], rows),
        *factors,
        *map(float, (*hyperparameters, log_beta1, log_beta2)),
        seed - (seed >> 31 << 32),  # as a signed integer of 32 bits
        SHARED=exp_avg_sq.shape[1] != width,
        SKIP_ZEROS=skip_zeros,
        **options,
    )
    # As torch's own optimizers do, so that a graph that saved the table does not run its backward with the moved one.
    torch.autograd.graph.increment_version(parameter)
