# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Times of each kernel beside torch's operators and the bandwidth of a copy, on rows that are named once (`unique`) and
by Zipf's law (`zipf`).

The bytes of an operation are those that it cannot avoid: each distinct row once, tokens and assignments once.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gpu.device import Device
from gpu.inputs import DTYPES, Latest, draw_rows, repeated_randn
from gpu.rows import Row
from gpu.settings import Settings
from modeling_peer import RowAdamW
from modeling_peer.experts import product_key_topk
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels import KERNELS
from modeling_peer.ops.retrieval import retrieve_on_kernels


KINDS = ("unique", "zipf")

# Torch's fused AdamW comes last: its state replaces that of the step.
TABLE_OPERATIONS = (
    *("up", "down", "group", "row_gradient", "squared_norm", "step"),
    *("torch: EmbeddingBag for down", "torch: index_add for row_gradient", "torch: fused AdamW, all rows"),
)
RETRIEVAL_OPERATIONS = ("retrieve", "gradients of retrieve", "torch: product and topk for retrieve")

# Bytes of a copy, which no cache holds.
COPIED = 2**31

# Tokens whose products torch's `index_add_` takes at a time.
ADDED_AT_A_TIME = 256


class Tables:
    """The tensors that operations on a table read, and the operations: calls and bytes by name."""

    def __init__(self, settings: Settings, width: int, kind: str):
        device, dtype, tokens = settings.device, DTYPES[settings.dtype], settings.kernel_tokens
        self.kernels, self.num_rows = KERNELS[settings.kernels], settings.num_experts
        self.table = nn.Parameter(repeated_randn(self.num_rows, width, dtype=dtype, device=device))
        self.indices = draw_rows(kind, tokens, settings.num_active, self.num_rows, device)
        self.tokens = torch.randn(tokens, width, device=device).to(dtype)
        self.weights = torch.randn(self.indices.shape, device=device).to(dtype)
        self.factors = Factors(self.weights, self.tokens, Assignments(self.indices, self.num_rows, settings.kernels))
        self.num_unique = self.indices.unique().numel()
        self.optimizer = RowAdamW([{"params": [self.table], "rows": True}], lr=1e-4)

    @functools.cached_property
    def gradient(self) -> torch.Tensor:
        """A dense gradient to write to; not for other operations, because it takes as much memory as the table."""
        return torch.zeros_like(self.table)

    @functools.cached_property
    def grouped(self) -> tuple[torch.Tensor, ...]:
        """The factors as kernels read them. A step makes them itself."""
        return self.factors.in_groups()

    def operations(self) -> dict[str, Callable[[], Any]]:
        """The operations of [`TABLE_OPERATIONS`]."""
        return {
            "up": lambda: self.kernels.up(self.tokens, self.indices, self.table.detach()),
            "down": lambda: self.kernels.down(self.weights, self.indices, self.table.detach()),
            "group": lambda: self.kernels.group(self.indices.flatten(), self.num_rows),
            "row_gradient": self._write_gradient,
            "squared_norm": lambda: self.kernels.squared_norm(*self.grouped),
            "step": self._step,
            "torch: EmbeddingBag for down": self._embedding_bag,
            "torch: index_add for row_gradient": self._index_add,
            "torch: fused AdamW, all rows": self._dense_step,
        }

    def bytes_of(self, operation: str) -> int | None:
        """Bytes that an operation cannot avoid."""
        size = self.table.element_size()
        rows = self.num_unique * self.table.shape[1]
        assignments, tokens = self.indices.numel(), self.tokens.nbytes
        indices = 8 * assignments
        return {
            "up": rows * size + tokens + indices + assignments * size,
            "down": rows * size + tokens + indices + assignments * size,
            "torch: EmbeddingBag for down": rows * size + tokens + indices + assignments * size,
            "row_gradient": rows * size + tokens + indices,
            "torch: index_add for row_gradient": rows * size + tokens + indices,
            "step": rows * (2 * size + 4 * 4) + tokens + indices,  # rows and two moments in float32, read and written
            "torch: fused AdamW, all rows": self.table.numel() * 7 * size,
        }.get(operation)

    def _write_gradient(self):
        self.kernels.row_gradient(*self.grouped, self.gradient, self.factors.rows)

    def _step(self):
        self.table.grad = FactoredGradient(self.table, [self.factors])
        self.optimizer.step()

    def _embedding_bag(self):
        F.embedding_bag(self.indices, self.table.detach(), mode="sum", per_sample_weights=self.weights)

    def _index_add(self):
        for start in range(0, len(self.tokens), ADDED_AT_A_TIME):
            piece = slice(start, start + ADDED_AT_A_TIME)
            products = (self.weights[piece, :, None] * self.tokens[piece, None]).flatten(0, 1)
            self.gradient.index_add_(0, self.indices[piece].flatten(), products)

    @functools.cached_property
    def _dense_optimizer(self):
        self.optimizer = None  # its moments take the memory
        self.table.grad = self.gradient.normal_()
        return torch.optim.AdamW([self.table], lr=1e-4, fused=True)

    def _dense_step(self):
        self._dense_optimizer.step()


class Retrieval:
    """What retrieval reads, and its operations."""

    def __init__(self, settings: Settings):
        half, k = settings.query_size // 2, settings.num_experts_per_head
        queries = torch.randn(settings.layer_tokens, settings.num_heads, 2, half, device=settings.device)
        sub_keys = torch.randn(1, 2, settings.grid_size, half, device=settings.device)
        self.tensors = [each.requires_grad_() for each in (queries, sub_keys)]
        self.k, self.kernels = k, settings.kernels
        self.scores = retrieve_on_kernels(*self.tensors, k, settings.kernels)[1]
        self.gradient = torch.randn_like(self.scores)

    def operations(self) -> dict[str, Callable[[], Any]]:
        """The operations of [`RETRIEVAL_OPERATIONS`]."""
        return {
            "retrieve": self._retrieve,
            "gradients of retrieve": self._backward,
            "torch: product and topk for retrieve": self._topk,
        }

    @torch.no_grad()
    def _retrieve(self):
        retrieve_on_kernels(*self.tensors, self.k, self.kernels)

    def _backward(self):
        torch.autograd.grad(self.scores, self.tensors, self.gradient, retain_graph=True)

    @torch.no_grad()
    def _topk(self):
        queries, sub_keys = self.tensors
        product_key_topk(torch.einsum("thpc,pnc->thpn", queries, sub_keys[0]), self.k)


def rows(settings: Settings, device: Device) -> dict[str, Row]:
    """All measurements by name."""
    tables, retrieval = Latest(Tables, device), Latest(Retrieval, device)
    found: dict[str, Row] = {"copy": functools.partial(measure_copy, settings, device)}
    for name in RETRIEVAL_OPERATIONS:
        found[name] = functools.partial(measure_retrieval, settings, device, retrieval, name)
    for width in settings.layer_widths:
        for kind in KINDS:
            for name in TABLE_OPERATIONS:
                found[row_name(name, width, kind)] = functools.partial(
                    measure_table, settings, device, tables, name, width, kind
                )
    return found


def row_name(operation: str, width: int, kind: str) -> str:
    """The name of the measurement of an operation on a table."""
    return f"{operation}, d = {width}, {kind}"


def measure_copy(settings: Settings, device: Device) -> dict[str, Any]:
    """The bandwidth of a copy, reads and writes counted."""
    source = repeated_randn(COPIED // (256 if settings.tiny else 4), dtype=torch.float32, device=settings.device)
    target = torch.empty_like(source)
    seconds = device.seconds(lambda: target.copy_(source), settings.repetitions)
    return {"seconds": seconds, "bytes": 2 * source.nbytes, "bytes_per_second": 2 * source.nbytes / seconds}


def measure_table(
    settings: Settings, device: Device, tables: Latest, operation: str, width: int, kind: str
) -> dict[str, Any]:
    """The time of an operation on a table."""
    made = tables(settings, width, kind)
    seconds = device.seconds(made.operations()[operation], settings.repetitions)
    fields = {"operation": operation, "width": width, "kind": kind, "unique_rows": made.num_unique}
    return {"seconds": seconds, "bytes": made.bytes_of(operation), **fields}


def measure_retrieval(settings: Settings, device: Device, retrieval: Latest, operation: str) -> dict[str, Any]:
    """The time of an operation of retrieval."""
    seconds = device.seconds(retrieval(settings).operations()[operation], settings.repetitions)
    return {"seconds": seconds, "operation": operation}
