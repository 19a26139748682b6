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
"""AdamW that moves only the rows of expert tables that a step touched, each with its own step count."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw

from ..factored_gradient import FactoredGradient, take_factors
from ..gradient_factors import Factors
from ..memory_advice import advise_huge_pages
from . import row_adamw_cpu as cpu
from . import row_adamw_triton as triton
from .stochastic_rounding import ROUNDED, random_bits, round_stochastically


if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate

SECOND_MOMENTS = ("full", "row")
MOMENTS = ("exp_avg", "exp_avg_sq")

# Elements of the rows that torch operations work on at a time: 1 MB in float32, so that intermediate results stay in
# the cache of a CPU. Launches on a GPU must be fewer.
CHUNK_ELEMENTS = 2**18
CHUNK_ELEMENTS_ON_GPU = 2**26


class RowAdamW(torch.optim.Optimizer):
    r"""
    AdamW (Loshchilov & Hutter, arXiv 1711.05101) for models with expert tables.

    In *row* parameters, those of groups with `"rows": True`, a step moves only the rows whose gradient has a non-zero
    element, and counts steps for each row: m and v of a row are corrected for bias by how often it was touched. All
    other rows and their state stay as they are: no weight decay, no stale momentum. The state is in float32, for
    float64 parameters in float64, and row parameters in 16 bits are rounded stochastically. All other parameters are
    treated as `torch.optim.AdamW` does.

    While the optimizer lives, expert tables among its row parameters have their gradients in factors (see
    [`FactoredGradient`]), which a step sums row by row without writing them. Gradients of row parameters may also be
    dense, or sparse by rows; the result is the same.

    On a CPU the steps of row parameters run in C that is compiled on first use, unless the environment variable
    `MODELING_PEER_COMPILE_KERNELS` is 0, and on a GPU in Triton; `expert_kernels` of a configuration is for its model
    alone.

    Args:
        params (`Iterable`): Parameters or groups of them, see [`expert_parameter_groups`]. A group may override the
            hyperparameters below, and may have `"rows"` (`bool`, defaults to `False`): whether its parameters, of
            shape `(num_rows, width)`, are row parameters.
        lr (`float`, *optional*, defaults to 0.001): Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Decay rates of m and of v.
        eps (`float`, *optional*, defaults to 1e-08): Added to √v.
        weight_decay (`float`, *optional*, defaults to 0.01): Decoupled: a step subtracts `lr * weight_decay` times the
            parameter.
        second_moment (`str`, *optional*, defaults to `"full"`): Second moments of row parameters: `"full"`, one for
            each element, or `"row"`, one for each row, of the mean of the squared gradient over the row.
        rounding_seed (`int`, *optional*, defaults to 0): Seed of the stochastic rounding, at least 0 and less than
            2^32, which is saved with the state. Replicas of a model must have the same.

    Raises:
        `ValueError`: for a hyperparameter out of its range, or a row parameter that is no matrix.

    ```python
    >>> from modeling_peer import RowAdamW, expert_parameter_groups

    >>> optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-3, weight_decay=0.1))
    ```

    [`make_optimizer`] makes it for a `Trainer`."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        second_moment: str = "full",
        rounding_seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"second_moment": second_moment, "rows": False, "rounding_seed": rounding_seed}
        _check_group({**defaults, "params": []})
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Raise `ValueError` as the constructor does."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._take_factors(self.param_groups[-1])

    def _take_factors(self, group):
        for parameter in group["params"] if group["rows"] else ():
            take_factors(parameter, self)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """
        Make a step on the parameters that have a gradient.

        Args:
            closure (`Callable`, *optional*): Evaluates the model again and returns the loss, which `step` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            dense = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.moves_by_rows(parameter, group):
                    self._step_rows(parameter, group)
                else:
                    dense.append(parameter)
            self._step_dense(dense, group)
        return loss

    @torch.no_grad()
    def make_state(self) -> None:
        """Make the state of all parameters that no step has moved yet, zeros, as it has to be to load another."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and not self.state[parameter]:
                    in_rows = group["rows"]
                    made = _row_state(parameter, group["second_moment"]) if in_rows else _dense_state(parameter, None)
                    self.state[parameter].update(made)

    def moves_by_rows(self, parameter: nn.Parameter, group: dict[str, Any]) -> bool:
        """Whether a step moves only the rows of a parameter of this group whose gradient has a non-zero element."""
        sparse = parameter.grad is not None and parameter.grad.is_sparse
        return group["rows"] or sparse or "row_steps" in self.state[parameter]

    def _step_rows(self, parameter, group):
        state = self.state[parameter]
        if "step" in state:
            raise ValueError(
                f"A parameter of shape {tuple(parameter.shape)} got a sparse gradient after dense ones: put it into a "
                'group with `"rows": True` from the start.'
            )
        gradient = _local_gradient(parameter)
        # Parts of rows are summed first: which rows are touched, all processes have to agree on.
        in_factors = isinstance(gradient, FactoredGradient) and not _is_dtensor(parameter)
        touched = None if in_factors else _touched_rows(parameter, gradient)
        if not state:
            state.update(_row_state(parameter, group["second_moment"]))
        local_state = {name: _local(tensor) for name, tensor in state.items()}
        if touched is None:
            if gradient.factors is not None:
                update_by_factors(parameter, state, gradient.factors, group)
            return
        rows, gradient, places = touched
        mean_squares = None
        if group["second_moment"] == "row" and _splits_rows(parameter):
            mean_squares = _mean_squares(parameter, gradient.index_select(0, places))
        update_rows(_local(parameter), local_state, rows, gradient, places, group, mean_squares)

    def _step_dense(self, parameters, group):
        for parameter in parameters:
            state = self.state[parameter]
            # torch's fused kernel counts steps where the parameter is.
            device = parameter.device if parameter.is_cuda else None
            if state:
                state["step"] = state["step"].to(device or state["step"].device)
            else:
                state.update(_dense_state(parameter, device))
        states = [self.state[parameter] for parameter in parameters]
        local = [_local(parameter) for parameter in parameters]
        adamw(
            local,
            [_local_gradient(parameter) for parameter in parameters],
            *([_local(state[name]) for state in states] for name in MOMENTS),
            [],
            [state["step"] for state in states],
            # torch's own choice on a CPU is a loop over the parameters, with several passes over memory on one thread.
            fused=bool(local) and all(each.is_floating_point() and (each.is_cpu or each.is_cuda) for each in local),
            has_complex=any(map(torch.is_complex, parameters)),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Load the state as torch's optimizers do, but keep the dtype of the state of row parameters. Raise
        `ValueError` for the state of another optimizer.
        """
        hook = self.register_load_state_dict_pre_hook(_keep_row_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter, saved in self.state.items():
            if isinstance(saved, _AsItIs):
                self.state[parameter] = saved.on(parameter)
        for group in self.param_groups:
            group.setdefault("rounding_seed", self.defaults.get("rounding_seed", 0))  # saved before there was one
            self._take_factors(group)


class _AsItIs:
    """
    The saved state of a row parameter, while `Optimizer.load_state_dict` handles the rest: it would cast every tensor
    except `step` to the dtype of its parameter.
    """

    def __init__(self, state):
        self.state = state

    def on(self, parameter):
        num_rows, width = parameter.shape
        shapes = {
            "row_steps": [(num_rows,)],
            "exp_avg": [(num_rows, width)],
            "exp_avg_sq": [(num_rows, width), (num_rows, 1)],
        }
        for name, expected in shapes.items():
            if tuple(self.state[name].shape) not in expected:
                raise ValueError(
                    f"`{name}` of a table of shape {(num_rows, width)} must be of shape {expected[0]}, found "
                    f"{tuple(self.state[name].shape)} in the state dict."
                )
        dtypes = {"row_steps": torch.int32}
        return {
            name: value.to(parameter.device, dtypes.get(name, _state_dtype(parameter)))
            for name, value in self.state.items()
        }


def _keep_row_state(optimizer, state_dict):
    for group in state_dict["param_groups"]:
        if not {"rows", "second_moment"} <= group.keys():
            raise ValueError(
                "The state dict is another optimizer's: expected groups with `rows` and `second_moment`, found groups "
                f"with {sorted(group)}. Start `RowAdamW` without it."
            )
    state = {
        parameter: _AsItIs(saved) if isinstance(saved, dict) and "row_steps" in saved else saved
        for parameter, saved in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _check_group(group):
    for name in ("lr", "eps", "weight_decay"):
        if not _is_number(group[name]) or not 0 <= group[name] < math.inf:
            raise ValueError(f"`{name}` must be a number, at least 0, got {group[name]!r}.")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"`betas` must be two numbers, at least 0 and less than 1, got {betas!r}.")
    if group["second_moment"] not in SECOND_MOMENTS:
        raise ValueError(f"`second_moment` must be one of {SECOND_MOMENTS}, got {group['second_moment']!r}.")
    if type(group["rounding_seed"]) is not int or not 0 <= group["rounding_seed"] < 2**32:
        raise ValueError(
            f"`rounding_seed` must be an integer, at least 0 and less than 2**32, got {group['rounding_seed']!r}."
        )
    if not isinstance(group["rows"], bool):
        raise ValueError(f"`rows` must be `True` or `False`, got {group['rows']!r}.")
    for parameter in group["params"] if group["rows"] else ():
        _check_row_parameter(parameter)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_row_parameter(parameter):
    shape = tuple(parameter.shape)
    if parameter.ndim != 2 or not parameter.is_floating_point():
        raise ValueError(
            f'Parameters of a group with `"rows": True` must be real, of shape (num_rows, width), got '
            f"{parameter.dtype} of shape {shape}."
        )


def _is_dtensor(tensor):
    return dist.is_available() and isinstance(tensor, DTensor)


def _local(tensor):
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _local_gradient(parameter):
    gradient = parameter.grad
    if _is_dtensor(gradient) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return _local(gradient)


def _state_dtype(parameter):
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _dense_state(parameter, device):
    zeros = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
    # As torch does for its fused kernel, whatever the default dtype: bfloat16 stops counting at 256.
    return {"step": torch.zeros((), dtype=torch.float32, device=device or "cpu"), **zeros}


def _row_state(parameter, second_moment):
    """Zeros: `row_steps [N]`, `exp_avg [N, d]` and `exp_avg_sq [N, d]` or `[N, 1]`, sharded like the parameter."""
    _check_row_parameter(parameter)
    dtype = _state_dtype(parameter)
    return {
        "row_steps": _zeros(parameter, lambda n, d: (n,), torch.int32),
        "exp_avg": _zeros(parameter, lambda n, d: (n, d), dtype),
        "exp_avg_sq": _zeros(parameter, lambda n, d: (n, d if second_moment == "full" else 1), dtype),
    }


def _zeros(parameter, shape_of, dtype):
    local = _local(parameter)
    zeros = advise_huge_pages(torch.empty(shape_of(*local.shape), dtype=dtype, device=local.device)).zero_()
    if not _is_dtensor(parameter):
        return zeros
    whole = torch.empty(shape_of(*parameter.shape), device="meta")
    # What has one element for each row is the same wherever a part of the row is.
    of_rows = whole.ndim == 1 or whole.shape[1] == 1
    placements = [Replicate() if of_rows and p.is_shard(1) else p for p in parameter.placements]
    return DTensor.from_local(
        zeros, parameter.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _touched_rows(parameter, gradient):
    """
    Rows of a parameter's local part whose gradient is non-zero, a tensor of gradients, and the row of each in that
    tensor.
    """
    if isinstance(gradient, FactoredGradient):
        if gradient.factors is None:
            gradient.set_factors([Factors.empty(gradient)])
        sums = gradient.factors.sums()
        places = _find_touched(sums, parameter).nonzero()[:, 0]
        return gradient.factors.entries.groups.rows.long()[places], sums, places
    if not gradient.is_sparse:
        rows = _find_touched(gradient, parameter).nonzero()[:, 0]
        return rows, gradient, rows
    if gradient.sparse_dim() != 1 or parameter.ndim != 2:
        raise ValueError(
            "`RowAdamW` takes sparse gradients by rows of parameters of shape (num_rows, width), got one that is "
            f"sparse in {gradient.sparse_dim()} dimensions of {tuple(parameter.shape)}."
        )
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    places = _find_touched(values, parameter).nonzero()[:, 0]
    return rows[places], values, places


def _find_touched(gradient, parameter):
    """For each row of a gradient, whether it is non-zero on any process that has a part of it: bool, `(num_rows,)`."""
    if cpu.can_update(gradient, None):
        touched = cpu.touched_rows(gradient)
    else:
        chunks = gradient.split(_rows_per_chunk(gradient))
        touched = torch.cat([chunk.ne(0).any(1) for chunk in chunks])
    if _is_dtensor(parameter):
        for dim, placement in enumerate(parameter.placements):
            if placement.is_shard(1):
                counts = touched.to(torch.uint8)
                dist.all_reduce(counts, dist.ReduceOp.MAX, parameter.device_mesh.get_group(dim))
                touched = counts.bool()
    return touched


def _splits_rows(parameter):
    """Whether processes hold parts of the rows of a parameter."""
    return _is_dtensor(parameter) and any(placement.is_shard(1) for placement in parameter.placements)


def _mean_squares(parameter, gradient):
    """Mean squares of whole rows of a gradient, of which this process has parts: `(num_rows, 1)`."""
    squares = gradient.to(_state_dtype(parameter)).square().sum(1, keepdim=True)
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard(1):
            dist.all_reduce(squares, group=parameter.device_mesh.get_group(dim))
    return squares / parameter.shape[1]


def _rows_per_chunk(table):
    elements = CHUNK_ELEMENTS if table.is_cpu else CHUNK_ELEMENTS_ON_GPU
    return max(1, elements // max(1, table.shape[1]))


def update_rows(
    parameter: torch.Tensor,
    state: dict[str, torch.Tensor],
    rows: torch.Tensor,
    gradient: torch.Tensor,
    places: torch.Tensor,
    group: dict[str, Any],
    mean_squares: torch.Tensor | None = None,
) -> None:
    """
    Make AdamW's step on some rows, in place: in C or Triton where that is possible, else in torch operations, chunk by
    chunk.

    Args:
        parameter (`torch.Tensor` of shape `(num_rows, width)`)
        state (`dict[str, torch.Tensor]`): Moments `exp_avg`, `exp_avg_sq` and step counts `row_steps`.
        rows (`torch.Tensor` of shape `(num_touched,)`): int64, distinct rows of the parameter.
        gradient (`torch.Tensor` of shape `(num_gradients, width)`)
        places (`torch.Tensor` of shape `(num_touched,)`): int64, for each of `rows` its row in `gradient`.
        group (`dict`): The parameter's group, with `lr`, `betas`, `eps` and `weight_decay`.
        mean_squares (`torch.Tensor` of shape `(num_touched, 1)`, *optional*):
            Mean squares of whole rows of the gradient, of which `gradient` has parts.
    """
    for kernels in (cpu, triton) if mean_squares is None else ():
        if kernels.can_update(parameter, gradient, (state["exp_avg"], state["exp_avg_sq"])):
            kernels.update_rows(parameter, state, rows, gradient, places, group)
            return
    size = _rows_per_chunk(parameter)
    for first in range(0, len(rows), size):
        chunk = slice(first, first + size)
        some = None if mean_squares is None else mean_squares[chunk]
        _update_chunk(parameter, state, rows[chunk], gradient.index_select(0, places[chunk]), group, some)


def update_by_factors(
    parameter: torch.Tensor, state: dict[str, torch.Tensor], factors: Factors, group: dict[str, Any]
) -> None:
    """
    Make AdamW's step on the rows whose gradient, the sum of some factors, is not zero: without a row of it being
    written where that is possible.

    Args:
        parameter, state, group: See [`update_rows`].
        factors ([`Factors`]): The gradient.
    """
    for kernels in (cpu, triton):
        if kernels.can_update(parameter, None, (state["exp_avg"], state["exp_avg_sq"])):
            kernels.update_by_factors(parameter, state, factors, group)
            return
    sums = factors.sums()
    places = sums.ne(0).any(1).nonzero()[:, 0]
    update_rows(parameter, state, factors.entries.groups.rows.long()[places], sums, places, group)


def _update_chunk(parameter, state, rows, gradient, group, mean_squares=None):
    beta1, beta2 = group["betas"]
    dtype = state["exp_avg"].dtype
    steps = state["row_steps"].index_select(0, rows) + 1
    gradient = gradient.to(dtype)
    first = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
    squares = gradient.square()
    if state["exp_avg_sq"].shape != state["exp_avg"].shape:
        squares = squares.mean(1, keepdim=True) if mean_squares is None else mean_squares.to(dtype)
    second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).add_(squares, alpha=1 - beta2)
    for name, values in (("row_steps", steps), ("exp_avg", first), ("exp_avg_sq", second)):
        state[name].index_copy_(0, rows, values)
    rate = group["lr"] / _bias_correction(beta1, steps, dtype)
    denominator = second.sqrt_().div_(_bias_correction(beta2, steps, dtype).sqrt_()).add_(group["eps"])
    values = parameter.index_select(0, rows).to(dtype).mul_(1 - group["lr"] * group["weight_decay"])
    values.sub_(first.mul_(rate).div_(denominator))
    if parameter.dtype in ROUNDED:
        bits = random_bits(group["rounding_seed"], rows, steps, values.shape[1])
        values = round_stochastically(values, parameter.dtype, bits)
    parameter.index_copy_(0, rows, values.to(parameter.dtype))


def _bias_correction(beta, steps, dtype):
    """`1 - beta ** steps`, which is small at first, without the cancellation of two numbers close to 1."""
    log_beta = math.log(beta) if beta else -math.inf
    return -torch.expm1(steps.to(dtype)[:, None] * log_beta)


__all__ = ["RowAdamW"]
