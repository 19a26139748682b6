# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""[`RowAdamW`] on a CPU, in C (`ops/csrc/row_adamw.c`): touched rows are read and written once, in one pass."""

import torch

from ..ops.gradient_factors import Factors
from ..ops.native import DTYPES, call, load_library


def can_update(parameter: torch.Tensor, gradient: torch.Tensor | None, moments: tuple[torch.Tensor, ...] = ()) -> bool:
    """Whether these kernels run on a parameter, its gradient (if it is not in factors) and its moments here."""
    sum_dtype = torch.promote_types(parameter.dtype, torch.float32)
    tensors = [parameter, *moments] if gradient is None else [parameter, *moments, gradient]
    return (
        parameter.dtype in DTYPES
        and (gradient is None or parameter.dtype == gradient.dtype)
        and all(moment.dtype == sum_dtype for moment in moments)
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
        and load_library() is not None
    )


def update_rows(parameter, state, rows, gradient, places, group) -> None:
    """See `row_adamw.update_rows`."""
    _step(parameter, state, rows.int(), (gradient, places, None, None, None, None), group)


def update_by_factors(parameter, state, factors: Factors, group) -> None:
    """
    Make AdamW's step on the rows whose gradient is not zero, in place: it is summed from its factors, row by row, and
    never written.
    """
    dtype = state["exp_avg_sq"].dtype
    coefficients, sources, starts, tokens = factors.in_groups()
    factors_in_memory = (coefficients.to(dtype), sources, starts, tokens.to(dtype).contiguous())
    _step(parameter, state, factors.rows, (None, None, *factors_in_memory), group)


def _step(parameter, state, rows, gradient, group):
    exp_avg_sq, width = state["exp_avg_sq"], parameter.shape[1]
    exp_avg = state.get("exp_avg")
    betas = group["betas"] if exp_avg is not None else (0.0, group["betas"][1])
    tensors = (parameter, exp_avg, exp_avg_sq, state["row_steps"], rows, *gradient)
    sizes = (len(rows), width, int(exp_avg_sq.shape[1] != width))
    hyperparameters = map(float, (group["lr"], *betas, group["eps"], group["weight_decay"]))
    name = f"adamw_{DTYPES[parameter.dtype]}"
    if call(name, *tensors, *sizes, *hyperparameters, group["rounding_seed"]):
        raise MemoryError(f"Out of memory in a step on {len(rows)} rows.")
    # As torch's own optimizers do, so that a graph that saved the table does not run its backward with the moved one.
    torch.autograd.graph.increment_version(parameter)
