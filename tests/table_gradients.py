# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests of gradients of expert tables: their rows in any layout, factors, and an optimizer that takes none."""

import torch
from tiny_models import tiny_config, tiny_model
from torch import nn

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.experts import expert_tables
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as a dense tensor, whether it is dense, sparse by rows or in factors."""
    return gradient.to_rows() if isinstance(gradient, FactoredGradient) else gradient.to_dense()


def in_factors(gradient: torch.Tensor, kernels: str = "cpu") -> FactoredGradient:
    """A dense gradient in factors, exactly: an assignment for each row that is not zero, the last one first."""
    rows = gradient.ne(0).any(1).nonzero()[:, 0].flip(0)
    tokens = gradient[rows].to(torch.promote_types(gradient.dtype, torch.float32))
    assignments = Assignments(rows[:, None], len(gradient), kernels)
    return FactoredGradient(gradient, [Factors(tokens.new_ones(len(rows), 1), tokens, assignments)])


def random_parts(
    seed: int,
    num_rows: int,
    width: int,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    kernels: str = "cpu",
) -> list[Factors]:
    """
    Factors of several backwards, each of `(num_tokens, num_active)`. A third of the assignments are to one of the first
    two rows, so that some rows are named very often and a token may name a row twice; some coefficients are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for shape in shapes:
        often = torch.rand(shape, generator=generator) < 1 / 3
        indices = torch.randint(num_rows, shape, generator=generator)
        indices = torch.where(often, indices % min(num_rows, 2), indices)
        coefficients = torch.randn(shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
        coefficients[torch.rand(shape, generator=generator) < 0.1] = 0
        tokens = torch.randn(shape[0], width, generator=generator).to(dtype)
        parts.append(Factors(coefficients, tokens, Assignments(indices, num_rows, kernels)))
    return parts


def literal_rows(parts: list[Factors], num_rows: int, width: int) -> torch.Tensor:
    """`Σ coefficients[t, a] tokens[t]` over the assignments to each row, in float64."""
    rows = torch.zeros(num_rows, width, dtype=torch.float64)
    for each in parts:
        products = each.coefficients.double()[:, :, None] * each.tokens.double()[:, None]
        rows.index_add_(0, each.assignments.rows.flatten(), products.flatten(0, 1))
    return rows


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The expert tables of a model by their names, each once."""
    tables = {id(module.weight) for module in expert_tables(model).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in tables}


def model_of(*feed_forward_types: str, **fields) -> PeerForCausalLM:
    """A small model in float64, in training mode."""
    return tiny_model(tiny_config(*(feed_forward_types or ("peer", "pkm")), **fields)).double().train()


def optimizer_of(model: nn.Module, optimizer_class: type[RowAdamW] = RowAdamW) -> RowAdamW:
    """One with the tables of a model as rows."""
    return optimizer_class(expert_parameter_groups(model, 1e-2, weight_decay=0.1))


class DenseRowAdamW(RowAdamW):
    """`RowAdamW` that leaves the gradients of its tables dense."""

    def _take_factors(self, group):
        pass
