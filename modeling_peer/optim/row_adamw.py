# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""AdamW that moves only the rows of expert tables that a step touched, each with its own step count."""

import math
import warnings
from collections.abc import Callable, Iterable
from operator import index
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

from ..memory.advice import advise_huge_pages
from ..ops.factored_gradient import FactoredGradient, take_factors
from ..ops.gradient_factors import Assignments, Factors
from ..ops.triton_check import is_triton_right
from . import row_adamw_cpu as cpu
from . import row_adamw_triton as triton
from .stochastic_rounding import ROUNDED, random_bits, round_stochastically


MOMENTS = ("exp_avg", "exp_avg_sq")

# By name: whether a value is right, and what is expected.
HYPERPARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("lr", "eps", "weight_decay"), (lambda value: 0 <= value < math.inf, "a number, at least 0")),
    "betas": (lambda pair: len(pair) == 2 and all(0 <= each < 1 for each in pair), "two numbers from 0 to below 1"),
    "first_moment": (lambda value: value in ("full", None), "'full' or None"),
    "second_moment": (lambda value: value in ("full", "row"), "'full' or 'row'"),
    "rounding_seed": (lambda value: 0 <= index(value) < 2**32, "an integer from 0 to 2^32 - 1"),
}

# Elements of the rows that torch operations work on at a time: 1 MB in float32, so that intermediate results stay in
# the cache of a CPU. Launches on a GPU must be fewer.
CHUNK_ELEMENTS = 2**18
CHUNK_ELEMENTS_ON_GPU = 2**26


class RowAdamW(torch.optim.Optimizer):
    r"""
    AdamW (Loshchilov & Hutter, arXiv 1711.05101) for models with expert tables.

    In *row* parameters, those of groups with `"rows": True`, a step moves only the rows whose gradient has a non-zero
    element, and counts steps for each row: m and v of a row are corrected for bias by how often it was touched. All
    other rows and their state stay as they are: no weight decay, no stale momentum. The state of rows is in float32,
    or in float64 for float64 parameters. Row parameters in 16 bits are rounded stochastically. All other parameters
    are treated as in `torch.optim.AdamW`.

    While the optimizer lives, expert tables among its row parameters have their gradients in factors (see
    [`FactoredGradient`]), which a step sums row by row without writing them. They may also be dense, and the result is
    the same; sparse gradients are not supported. Until the step, a write through `.data` to a layer's input, or to the
    gradient of its output, changes the gradient unnoticed, as in autograd.

    On a CPU the steps of row parameters run in C that is compiled on first use, unless the environment variable
    `MODELING_PEER_COMPILE_KERNELS` is 0. On a GPU they run in Triton, if there is a first moment. The `expert_kernels`
    of a configuration has no effect here.

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
        first_moment (`str`, *optional*, defaults to `"full"`): First moments of row parameters: `"full"`, one for
            each element, or `None`, without momentum. With one second moment a row and no first, the state of a row is
            8 bytes, whatever its width.
        rounding_seed (`int`, *optional*, defaults to 0): Seed of the stochastic rounding, at least 0 and less than
            2^32, which is saved with the state. Replicas of a model must have the same.

    Raises:
        `ValueError`: for a hyperparameter out of its range, or a row parameter that is not a real matrix.

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
        first_moment: str | None = "full",
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "first_moment": first_moment}
        defaults |= {"second_moment": second_moment, "rows": False, "rounding_seed": rounding_seed}
        params = params if isinstance(params, torch.Tensor) else list(params)  # torch refuses a tensor
        if not any(isinstance(each, dict) and "rows" in each for each in params):
            warnings.warn(
                "No group of parameters says `rows`: all are moved as by `torch.optim.AdamW`. Give `RowAdamW` the "
                "groups of `expert_parameter_groups(model, learning_rate)`, or a `Trainer` that of `make_optimizer`.",
                stacklevel=2,
            )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Raise `ValueError` as the constructor does."""
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._take_factors(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _take_factors(self, group):
        rows = group["params"] if group["rows"] else ()
        for each in rows:
            if each.ndim != 2 or not each.is_floating_point():
                raise ValueError(f"Row parameters must be real matrices, got {each.dtype} of shape {each.shape}.")
        for each in rows:
            take_factors(each, self)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """
        Make a step on the parameters that have a gradient. A `closure` evaluates the model again and returns the loss,
        which `step` returns.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                _check_step(parameter, self.state[parameter], group["rows"])
            if not group["rows"]:
                self._step_dense(moved, group)
                continue
            for parameter in moved:
                self._step_rows(parameter, group)
        return loss

    @torch.no_grad()
    def make_state(self) -> None:
        """Make zero state for all parameters that no step has moved yet, as is needed to load another state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and not self.state[parameter]:
                    made = _row_state(parameter, group) if group["rows"] else _dense_state(parameter)
                    self.state[parameter].update(made)

    def _step_rows(self, parameter, group):
        state, gradient = self.state[parameter], _local_gradient(parameter)
        if not state:
            state.update(_row_state(parameter, group))
        local, local_state = _local(parameter), {name: _local(tensor) for name, tensor in state.items()}
        needs_sums = group["second_moment"] == "row" and _groups_of_rows(parameter)
        if isinstance(gradient, FactoredGradient) and not needs_sums:
            counts = local_state["row_steps"].clone() if _groups_of_rows(parameter) else None
            if gradient.factors is not None:
                update_by_factors(local, local_state, gradient.factors, group)
            if counts is not None:
                # Rows whose gradient is zero in this process's part, but not in another's.
                touched = local_state["row_steps"] != counts
                rows = (_touched_anywhere(touched, parameter) & ~touched).nonzero()[:, 0]
                update_rows(local, local_state, rows, torch.zeros_like(local[:1]), torch.zeros_like(rows), group)
            return
        rows, gradient, places = _touched_rows(parameter, gradient)
        mean_squares = _mean_squares(parameter, gradient.index_select(0, places)) if needs_sums else None
        update_rows(local, local_state, rows, gradient, places, group, mean_squares)

    def _step_dense(self, parameters, group):
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state.update(_dense_state(parameter))
            # On a GPU torch's fused kernel counts steps where the parameter is.
            state["step"] = state["step"].to(parameter.device if parameter.is_cuda else "cpu")
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
        `ValueError` for the state of another optimizer, or of tables of another size.
        """
        if any(not {"rows", "second_moment"} <= group.keys() for group in state_dict["param_groups"]):
            raise ValueError("The state dict is another optimizer's. Start `RowAdamW` without it.")
        # torch would cast every tensor except `step` to the dtype of its parameter.
        of_rows = {place: state for place, state in state_dict["state"].items() if "row_steps" in state}
        others = {place: state for place, state in state_dict["state"].items() if place not in of_rows}
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        # Before anything changes; torch reports groups that do not match.
        pairs = zip(places, parameters, strict=False)
        found = {own: _state_for(own, of_rows[place]) for place, own in pairs if place in of_rows}
        super().load_state_dict({**state_dict, "state": others})
        self.state.update(found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # States that were saved before these existed lack them.
            group.setdefault("rounding_seed", self.defaults.get("rounding_seed", 0))
            group.setdefault("first_moment", "full")
            self._take_factors(group)


def _check_group(group):
    for name, (is_right, expected) in HYPERPARAMETERS.items():
        try:
            found = is_right(group[name])
        except TypeError:
            found = False
        if not found:
            raise ValueError(f"`{name}` must be {expected}, got {group[name]!r}.")


def _check_step(parameter, state, is_rows):
    """Raise `ValueError` for what kernels, which trust the shape and dtype of a parameter, cannot take."""
    if parameter.grad.layout is not torch.strided:
        raise ValueError("`RowAdamW` takes no sparse gradient: make embeddings with `sparse=False`.")
    dtype = torch.promote_types(parameter.dtype, torch.float32) if is_rows else parameter.dtype
    for name in MOMENTS:
        moment = state.get(name, parameter)
        if moment is not parameter and (moment.dtype != dtype or not _is_shape_of(moment, parameter, is_rows)):
            raise ValueError(
                f"`{name}` is {moment.dtype} of shape {tuple(moment.shape)}, its parameter {parameter.dtype} of shape "
                f"{tuple(parameter.shape)}: make a new optimizer after a model has changed."
            )


def _is_shape_of(moment, parameter, is_rows):
    """Whether a moment has one element for each of a parameter, or for each row."""
    return moment.shape == parameter.shape or (is_rows and moment.shape == (len(parameter), 1))


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(parameter):
    gradient = parameter.grad
    split = isinstance(gradient, DTensor) and gradient.placements != parameter.placements
    return _local(gradient.redistribute(placements=parameter.placements) if split else gradient)


def _dense_state(parameter):
    zeros = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
    # As torch does for its fused kernel, whatever the default dtype: bfloat16 stops counting at 256.
    return {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **zeros}


def _row_state(parameter, group):
    """
    Zeros: `row_steps [N]`, `exp_avg [N, d]` unless there is no momentum, and `exp_avg_sq [N, d]` or `[N, 1]`, sharded
    like the parameter.
    """
    dtype, is_full = torch.promote_types(parameter.dtype, torch.float32), group["second_moment"] == "full"
    state = {"row_steps": _zeros(parameter, lambda n, d: (n,), torch.int32)}
    if group["first_moment"] is not None:
        state["exp_avg"] = _zeros(parameter, lambda n, d: (n, d), dtype)
    return state | {"exp_avg_sq": _zeros(parameter, lambda n, d: (n, d if is_full else 1), dtype)}


def _state_for(parameter, state):
    """Convert the saved state of a row parameter to the device and the dtypes that it has here."""
    num_rows, width = parameter.shape
    shapes = {"row_steps": [()], "exp_avg": [(width,)], "exp_avg_sq": [(width,), (1,)]}
    for name, value in state.items():
        found, widths = tuple(value.shape), shapes[name]
        if found[0] != num_rows or found[1:] not in widths:
            raise ValueError(f"`{name}` of shape {found} is not that of a table of shape {(num_rows, width)}.")
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return {
        name: value.to(parameter.device, torch.int32 if name == "row_steps" else dtype)
        for name, value in state.items()
    }


def _zeros(parameter, shape_of, dtype):
    local = _local(parameter)
    zeros = advise_huge_pages(torch.empty(shape_of(*local.shape), dtype=dtype, device=local.device)).zero_()
    if not isinstance(parameter, DTensor):
        return zeros
    whole = torch.empty(shape_of(*parameter.shape), device="meta")
    # State with one element for each row is the same on all processes that have a part of the row.
    of_rows = whole.ndim == 1 or whole.shape[1] == 1
    placements = [Replicate() if of_rows and p.is_shard(1) else p for p in parameter.placements]
    return DTensor.from_local(
        zeros, parameter.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _touched_rows(parameter, gradient):
    """
    Return the rows of a parameter's local part whose gradient is non-zero, a tensor of gradients, and the place of
    each row there.
    """
    if isinstance(gradient, FactoredGradient):
        factors = gradient.factors or Factors.empty(gradient)
        sums = factors.sums()
        places = _find_touched(sums, parameter).nonzero()[:, 0]
        return factors.rows.long()[places], sums, places
    rows = _find_touched(gradient, parameter).nonzero()[:, 0]
    return rows, gradient, rows


def _find_touched(gradient, parameter):
    """For each row of a gradient, whether it is non-zero on any process that has a part of it: bool, `(num_rows,)`."""
    touched = torch.cat([chunk.ne(0).any(1) for chunk in gradient.split(_rows_per_chunk(gradient))])
    return _touched_anywhere(touched, parameter)


def _touched_anywhere(touched, parameter):
    """Whether rows are touched, bool, on any process that has a part of them."""
    for process_group in _groups_of_rows(parameter):
        counts = touched.to(torch.uint8)
        dist.all_reduce(counts, dist.ReduceOp.MAX, process_group)
        touched = counts.bool()
    return touched


def _groups_of_rows(parameter):
    """The groups of processes that hold parts of the rows of a parameter."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return [parameter.device_mesh.get_group(dim) for dim, each in enumerate(placements) if each.is_shard(1)]


def _mean_squares(parameter, gradient):
    """Mean squares of whole rows of a gradient, of which this process has parts: `(num_rows, 1)`."""
    squares = gradient.to(torch.promote_types(parameter.dtype, torch.float32)).square().sum(1, keepdim=True)
    for process_group in _groups_of_rows(parameter):
        dist.all_reduce(squares, group=process_group)
    return squares / parameter.shape[1]


def _rows_per_chunk(table):
    return max(1, (CHUNK_ELEMENTS if table.is_cpu else CHUNK_ELEMENTS_ON_GPU) // max(1, table.shape[1]))


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
    chunk. The gradient of distinct `rows[i]` (int64, `(num_touched,)`) is row `places[i]` of `gradient`. If `gradient`
    has only parts of rows, `mean_squares`, of shape `(num_touched, 1)`, are those of whole rows.
    """
    kernels = _kernels_for(parameter, gradient, state) if mean_squares is None else None
    if kernels is not None:
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
    """Make the step on the rows whose gradient, a sum of factors, is not zero. Kernels do not write the sum."""
    kernels = _kernels_for(parameter, None, state)
    if kernels is not None:
        kernels.update_by_factors(parameter, state, factors, group)
        return
    sums = factors.sums()
    places = sums.ne(0).any(1).nonzero()[:, 0]
    update_rows(parameter, state, factors.rows.long()[places], sums, places, group)


def _kernels_for(parameter, gradient, state):
    """Return the kernels that make a step, if any. Those in Triton need a first moment, and are compared on a GPU."""
    moments = tuple(state[name] for name in MOMENTS if name in state)
    if cpu.can_update(parameter, gradient, moments):
        return cpu
    if "exp_avg" not in state or not triton.can_update(parameter, gradient, moments):
        return None
    return triton if not parameter.is_cuda or is_triton_right(parameter, _results_of_a_step) else None


def _results_of_a_step(kernels, device, dtype):
    """See [`results_of_experts`]."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(4, 96, generator=generator, dtype=torch.float32, device="cpu").to(device) for _ in range(4)]
    table, gradient, rows = inputs[0].to(dtype), inputs[1], torch.arange(4, device=device)
    state = {"row_steps": rows.int(), "exp_avg": inputs[2], "exp_avg_sq": inputs[3]}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "rounding_seed": 1}
    if kernels == "triton":
        factors = Factors(gradient.new_ones(4, 1), gradient, Assignments(rows[:, None], 4, kernels))
        triton.update_by_factors(table, state, factors, group)
    else:
        _update_chunk(table, state, rows, gradient, group)
    return state | {"table": table}


def _update_chunk(parameter, state, rows, gradient, group, mean_squares=None):
    has_momentum = "exp_avg" in state
    beta1, beta2 = group["betas"] if has_momentum else (0.0, group["betas"][1])
    dtype = state["exp_avg_sq"].dtype
    steps = state["row_steps"].index_select(0, rows) + 1
    gradient = gradient.to(dtype)
    first = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1) if has_momentum else gradient.clone()
    squares = gradient.square()
    if state["exp_avg_sq"].shape != parameter.shape:
        squares = squares.mean(1, keepdim=True) if mean_squares is None else mean_squares.to(dtype)
    second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).add_(squares, alpha=1 - beta2)
    for name, values in (("row_steps", steps), ("exp_avg", first), ("exp_avg_sq", second)):
        if name in state:
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
    return -torch.expm1(steps.to(dtype)[:, None] * (math.log(beta) if beta else -math.inf))
