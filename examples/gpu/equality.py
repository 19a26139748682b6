# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Equality of kernels, optimizer, layer and model on a GPU with references in float64, and what must not happen there:
that the host waits, or that a graph cannot be captured.

An error is measured in units of what rounding explains: results are in the dtype of the inputs, and sums are
accumulated in float32. A check passes if the largest is at most 1.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gpu.device import Device
from gpu.equality_layers import layer_rows
from gpu.inputs import DTYPES, Experts, draw_experts
from gpu.rows import Row
from gpu.settings import Settings
from modeling_peer.experts import expert_cell, product_key_topk
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels import KERNELS
from modeling_peer.ops.kernels_torch import TorchKernels
from modeling_peer.ops.retrieval import retrieve_on_kernels


# Of a sum in float32, in units of the sum of absolute values: eight times the rounding of one addition.
SUM_ERROR = 2.0**-21


def rows(settings: Settings, device: Device) -> dict[str, Row]:
    """All checks by name."""
    checks: dict[str, Row] = {}
    for name, dtype in DTYPES.items():
        for operation, check in OPERATIONS.items():
            for where, cases in (("", settings.checked), (", production sizes", settings.production)):
                checks[f"{operation}, {name}{where}"] = functools.partial(check_kernel, settings, check, dtype, cases)
    checks["group"] = functools.partial(check_groups, settings)
    checks["retrieve, exact scores"] = functools.partial(check_exact_retrieval, settings)
    checks["retrieve, random scores"] = functools.partial(check_random_retrieval, settings)
    checks["retrieve, TF32 allowed"] = functools.partial(check_retrieval_with_tf32, settings)
    checks["gradients of retrieve"] = functools.partial(check_retrieval_gradients, settings)
    return checks | layer_rows(settings, device)


def largest_error(actual: torch.Tensor, expected: torch.Tensor, sums: torch.Tensor) -> float:
    """The largest error, where `sums` are the sums of absolute values; infinite where a result is not finite."""
    info = torch.finfo(actual.dtype)
    allowed = info.eps * expected.abs() + SUM_ERROR * sums + info.tiny * info.eps
    return ((actual.double() - expected).abs() / allowed).nan_to_num(float("inf")).max().item()


def worst_of(errors: Iterator[tuple[str, float]]) -> dict[str, Any]:
    """What a check found, from all its cases."""
    found = list(errors)
    where, worst = max(found, key=lambda each: each[1])
    return {"passed": worst <= 1, "worst": worst, "where": where, "cases": len(found)}


def check_kernel(
    settings: Settings, check: Callable[[Experts, str], float], dtype: torch.dtype, cases: dict[str, list]
) -> dict[str, Any]:
    """Checks an operation at some sizes and widths."""

    def errors():
        for sizes, width in itertools.product(cases["sizes"], cases["widths"]):
            experts = draw_experts(sizes, width, dtype, settings.device)
            yield f"T, A, N = {sizes}, d = {width}", check(experts, settings.kernels)

    return worst_of(errors())


def up_error(experts: Experts, kernels: str) -> float:
    """The largest error of products of tokens and rows."""
    arguments = (experts.hidden, experts.indices, experts.table)
    return _table_error("up", arguments, kernels)


def down_error(experts: Experts, kernels: str) -> float:
    """The largest error of sums of rows."""
    arguments = (experts.weights, experts.indices, experts.table)
    return _table_error("down", arguments, kernels)


def _table_error(operation, arguments, kernels):
    first, indices, table = arguments
    actual = getattr(KERNELS[kernels], operation)(*arguments)
    reference = getattr(TorchKernels, operation)
    expected = reference(first.double(), indices, table.double())
    return largest_error(actual, expected, reference(first.double().abs(), indices, table.double().abs()))


def row_gradient_error(experts: Experts, kernels: str) -> float:
    """The largest error of dense rows and of the rows of groups. Tokens whose coefficient is zero do not count."""
    factors = _factors(experts, kernels)
    coefficients, tokens = factors.coefficients.double(), factors.tokens.double()
    tokens = tokens.nan_to_num(posinf=0.0)
    expected = _dense_gradient(coefficients, tokens, experts)
    sums = _dense_gradient(coefficients.abs(), tokens.abs(), experts)
    dense = largest_error(factors.to_rows(experts.table.dtype), expected, sums)
    named = factors.assignments.by_row.starts.diff() > 0
    places = factors.rows.long()[named]
    return max(dense, largest_error(factors.sums()[named], expected[places], sums[places]))


def squared_norm_error(experts: Experts, kernels: str) -> float:
    """The error of the norm of all rows."""
    factors = _factors(experts, kernels)
    actual = factors.assignments.run.squared_norm(*factors.in_groups())
    coefficients, tokens = factors.coefficients.double(), factors.tokens.double().nan_to_num(posinf=0.0)
    expected = _dense_gradient(coefficients, tokens, experts).square().sum()
    sums = _dense_gradient(coefficients.abs(), tokens.abs(), experts).square().sum()
    return ((actual - expected).abs() / (4 * SUM_ERROR * sums)).nan_to_num(float("inf")).item()


OPERATIONS = {
    "up": up_error,
    "down": down_error,
    "row_gradient": row_gradient_error,
    "squared_norm": squared_norm_error,
}


def _factors(experts, kernels):
    weights, tokens = experts.weights.clone(), experts.hidden.clone()
    if len(tokens) > 1:
        tokens[0] = float("inf")
        weights[0] = 0
    return Factors(weights, tokens, Assignments(experts.indices, len(experts.table), kernels))


def _dense_gradient(coefficients, tokens, experts):
    gradient = torch.zeros(experts.table.shape, dtype=torch.float64, device=tokens.device)
    for each, indices in zip(coefficients.T, experts.indices.T, strict=True):
        gradient.index_add_(0, indices, each[:, None] * tokens)
    return gradient


def check_groups(settings: Settings) -> dict[str, Any]:
    """Groups are those of a stable sort. Kernels may add empty groups at the end."""

    def errors():
        for sizes in (*settings.checked["sizes"], *settings.production["sizes"]):
            indices = draw_experts(sizes, 1, torch.float32, settings.device).indices.flatten()
            rows, starts, order = KERNELS[settings.kernels].group(indices, sizes[2])
            expected_rows, expected_starts, expected_order = TorchKernels.group(indices, sizes[2])
            count = len(expected_rows)
            same = (
                rows[:count].equal(expected_rows)
                and starts[: count + 1].equal(expected_starts)
                and bool((starts[count:] == len(indices)).all())
                and order.equal(expected_order)
            )
            yield f"T, A, N = {sizes}", 0.0 if same else float("inf")

    return worst_of(errors())


def _queries_and_keys(sizes, device):
    num_tokens, num_heads, grid_size, half, _, num_sets = sizes
    queries = torch.randn(num_tokens, num_heads, 2, half, device=device)
    return queries, torch.randn(num_sets, 2, grid_size, half, device=device)


def _scores(queries, sub_keys):
    """Scores of the halves with all sub-keys, in float64."""
    of_heads = sub_keys.double().expand(queries.shape[1], -1, -1, -1)
    return torch.einsum("thpc,hpnc->thpn", queries.double(), of_heads)


def _scores_of(indices, scores):
    """The scores of some experts, from those of the halves."""
    row, column = expert_cell(indices)
    return scores[..., 0, :].gather(-1, row) + scores[..., 1, :].gather(-1, column)


def _are_distinct(indices):
    return bool((indices.sort(-1).values.diff() > 0).all())


def check_exact_retrieval(settings: Settings) -> dict[str, Any]:
    """
    Scores that every order of additions computes exactly: what is retrieved is what torch selects from all scores in
    float32, bit for bit; of equal scores, either.
    """
    differing = 0

    def errors():
        nonlocal differing
        for sizes in settings.retrievals:
            queries, sub_keys = _queries_and_keys(sizes, settings.device)
            place = torch.randint(sizes[3], queries.shape[:-1], device=queries.device)
            queries = F.one_hot(place, sizes[3]).float() * queries.sign()
            sub_keys = torch.randint(-(2**19), 2**19, sub_keys.shape, device=queries.device).float()
            indices, scores = retrieve_on_kernels(queries, sub_keys, sizes[4], settings.kernels)
            exact = _scores(queries, sub_keys)
            expected, best = product_key_topk(exact.float(), sizes[4])
            differing += int((indices != expected).sum())
            same = scores.equal(best) and _scores_of(indices, exact).equal(best.double()) and _are_distinct(indices)
            yield f"T, h, √N, d_k / 2, k, key sets = {sizes}", 0.0 if same else float("inf")

    return {**worst_of(errors()), "indices_of_equal_scores": differing}


def check_random_retrieval(settings: Settings) -> dict[str, Any]:
    """Scores are those of the retrieved experts, which are the best k up to the rounding of their scores."""
    differing = total = 0

    def errors():
        nonlocal differing, total
        for sizes in settings.retrievals:
            queries, sub_keys = _queries_and_keys(sizes, settings.device)
            indices, scores = retrieve_on_kernels(queries, sub_keys, sizes[4], settings.kernels)
            exact = _scores(queries, sub_keys)
            expected, best = product_key_topk(exact, sizes[4])
            sums = 2 * _scores(queries.abs(), sub_keys.abs()).amax((-1, -2))[..., None].expand_as(best)
            differing += int((indices.sort(-1).values != expected.sort(-1).values).any(-1).sum())
            total += indices[..., 0].numel()
            of_indices = _scores_of(indices, exact)
            error = max(
                largest_error(scores, of_indices, sums),
                largest_error(of_indices.sort(-1, descending=True).values.float(), best, sums),
            )
            yield f"T, h, √N, d_k / 2, k, key sets = {sizes}", error if _are_distinct(indices) else float("inf")

    return {**worst_of(errors()), "differing_sets": differing, "sets": total}


def check_retrieval_with_tf32(settings: Settings) -> dict[str, Any]:
    """Products in TF32, which `Trainer(tf32=True)` allows everywhere, must not change what is retrieved."""
    before = torch.get_float32_matmul_precision()

    def errors():
        for sizes in settings.retrievals:
            queries, sub_keys = _queries_and_keys(sizes, settings.device)
            found = []
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                found.append(retrieve_on_kernels(queries, sub_keys, sizes[4], settings.kernels)[0])
            yield f"T, h, √N, d_k / 2, k, key sets = {sizes}", 0.0 if found[0].equal(found[1]) else float("inf")

    try:
        return worst_of(errors())
    finally:
        torch.set_float32_matmul_precision(before)


def check_retrieval_gradients(settings: Settings) -> dict[str, Any]:
    """Gradients of queries and sub-keys against those of autograd in float64."""

    def errors():
        for sizes in settings.retrievals:
            tensors = [each.requires_grad_() for each in _queries_and_keys(sizes, settings.device)]
            indices, scores = retrieve_on_kernels(*tensors, sizes[4], settings.kernels)
            gradient = torch.randn_like(scores)
            actual = torch.autograd.grad(scores, tensors, gradient)
            expected = _retrieval_gradients(gradient.double(), indices, *(each.double() for each in tensors))
            sums = _retrieval_gradients(gradient.double().abs(), indices, *(each.double().abs() for each in tensors))
            error = max(map(largest_error, actual, expected, sums))
            yield f"T, h, √N, d_k / 2, k, key sets = {sizes}", error

    return worst_of(errors())


def _retrieval_gradients(gradient, indices, queries, sub_keys):
    tensors = [each.detach().requires_grad_() for each in (queries, sub_keys)]
    return torch.autograd.grad(_scores_of(indices, _scores(*tensors)), tensors, gradient)
