# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts, their gradients and their retrieval on a CPU, in C: the sources are in `csrc`, see `native.py`."""

from collections.abc import Sequence

import torch

from .kernels_torch import check_num_retrieved, empty_gradients
from .native import COMPILE_VARIABLE, DTYPES, call, check_tensor, load_library, refuse_index
from .quantized_rows import INTEGER_DTYPES, SCALE_DTYPE, QuantizedRows


class CpuKernels:
    """
    The experts and their gradients in C. Signatures are those of [`TorchKernels`], with product-key retrieval and its
    gradients in addition.

    `up`, `down`, `retrieve` and `retrieval_gradients` raise `ValueError` naming an argument that C cannot read. An
    expert index out of range raises `IndexError`. `group` takes at most 2^31 - 1 assignments.
    """

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        """Return a sentence that says why these kernels cannot run on a table, or `None` if they can."""
        if not table.is_cpu:
            return f"CPU kernels are for the CPU, the experts are on {table.device}."
        if table.dtype not in DTYPES:
            return f"CPU kernels support {sorted(map(str, DTYPES))}, the experts are {table.dtype}."
        if load_library() is None:
            return f"there is no C compiler that works, or {COMPILE_VARIABLE} in the environment switches it off."
        return None

    @staticmethod
    def up(hidden_states: torch.Tensor, rows: torch.Tensor, table: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """`(hidden [T, d], rows [T, A], table [N, d]) -> [T, A]`"""
        return _on_table("up", "hidden_states", hidden_states, rows, table)

    @staticmethod
    def down(weights: torch.Tensor, rows: torch.Tensor, table: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """`(weights [T, A], rows [T, A], table [N, d]) -> [T, d]`"""
        return _on_table("down", "weights", weights, rows, table)

    @staticmethod
    def group(rows: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See [`TorchKernels.group`]. Raises `IndexError` for an index that is out of range."""
        count = len(rows)
        named, starts, order = (
            torch.empty(size, dtype=torch.int32, device="cpu") for size in (count, count + 1, count)
        )
        found = call("group", rows.contiguous(), count, num_rows, named, starts, order)
        if found == -2:
            refuse_index(rows, num_rows)
        _check_memory(found)
        return named[:found], starts[: found + 1], order

    @staticmethod
    def row_gradient(coefficients, sources, starts, tokens, out, places=None) -> None:
        """See [`TorchKernels.row_gradient`]."""
        factors = _factors(coefficients, sources, starts, tokens, out.dtype)
        name = f"row_gradient_{DTYPES[out.dtype]}"
        _check_memory(call(name, *factors, out, places, len(starts) - 1, out.shape[1]))

    @staticmethod
    def squared_norm(coefficients, sources, starts, tokens) -> torch.Tensor:
        """See [`TorchKernels.squared_norm`]."""
        dtype = torch.promote_types(coefficients.dtype, torch.float32)
        factors = _factors(coefficients, sources, starts, tokens, dtype)
        total = torch.empty((), dtype=torch.float64, device="cpu")
        _check_memory(call(f"squared_norm_{DTYPES[dtype]}", *factors, total, len(starts) - 1, *tokens.shape))
        return total

    @staticmethod
    def retrieve(queries: torch.Tensor, sub_keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run [`~experts.retrieve`] on queries and sub-keys in float32."""
        sizes = _retrieval_sizes(queries, sub_keys)
        check_num_retrieved(k, sub_keys.shape[2])
        scores = torch.empty(*queries.shape[:2], k, device="cpu", dtype=torch.float32)
        indices = torch.empty_like(scores, dtype=torch.int64)
        _check_memory(call("retrieve", queries.contiguous(), sub_keys.contiguous(), indices, scores, *sizes, k))
        return indices, scores

    @staticmethod
    def retrieval_gradients(
        gradient: torch.Tensor,
        indices: torch.Tensor,
        queries: torch.Tensor,
        sub_keys: torch.Tensor,
        wanted: Sequence[bool] = (True, True),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute the gradients of the queries and sub-keys of [`CpuKernels.retrieve`] from the gradient of its scores,
        `[T, h, k]`, and the expert indices. A gradient that is not `wanted` has no elements.
        """
        sizes = _retrieval_sizes(queries, sub_keys)
        check_tensor("indices", indices, (torch.int64,), (*queries.shape[:2], indices.shape[-1]))
        check_tensor("gradient", gradient, (torch.float32,), indices.shape)
        arguments = [each.contiguous() for each in (gradient, indices, queries, sub_keys)]
        results = empty_gradients(arguments[2], arguments[3], wanted)
        failed = call("retrieval_gradients", *arguments, *results, *sizes, indices.shape[2])
        if failed > 0:
            refuse_index(indices, sub_keys.shape[2] ** 2)
        _check_memory(failed)
        return results


def _on_table(function, name, tokens, rows, table):
    """Call `up` or `down` on a plain or quantized table; errors call the argument `tokens` by `name`."""
    check_tensor("rows", rows, (torch.int64,), 2)
    if isinstance(table, QuantizedRows):
        num_rows, num_bytes, width = len(table.scales), -(-table.width * table.bits // 8), table.width
        check_tensor("integers", table.integers, INTEGER_DTYPES.values(), (num_rows, num_bytes))
        check_tensor("scales", table.scales, (SCALE_DTYPE,), (num_rows, -(-num_bytes // table.bytes_per_scale)))
        dtype, suffix, tensors = torch.float32, table.bits, (table.integers, table.scales)
        sizes: tuple[int, ...] = (width, num_bytes, table.bytes_per_scale)
    else:
        check_tensor("table", table, DTYPES, 2)
        num_rows, width = table.shape
        dtype, suffix = torch.promote_types(table.dtype, torch.float32), DTYPES[table.dtype]
        tensors, sizes = (table,), (width,)
    shapes = [(len(rows), width), rows.shape]
    if function == "down":
        shapes.reverse()
    check_tensor(name, tokens, None, shapes[0])
    output = torch.empty(shapes[1], dtype=dtype, device="cpu")
    arguments = [each.contiguous() for each in (tokens.to(dtype), rows, *tensors)]
    if call(f"{function}_{suffix}", *arguments, output, num_rows, *rows.shape, *sizes):
        refuse_index(rows, num_rows)
    return output.to(tokens.dtype)


def _factors(coefficients, sources, starts, tokens, dtype):
    """The factors of a gradient as C reads them, for rows of `dtype`."""
    dtype = torch.promote_types(dtype, torch.float32)
    coefficients, tokens = (each.to(dtype).contiguous() for each in (coefficients, tokens))
    return coefficients, sources.contiguous(), starts.contiguous(), tokens


def _retrieval_sizes(queries, sub_keys):
    """Return the numbers of tokens, heads and sets of sub-keys, √N and d_k / 2."""
    for name, tensor in (("queries", queries), ("sub_keys", sub_keys)):
        check_tensor(name, tensor, (torch.float32,), 4)
    (num_tokens, num_heads, _, width), (num_sets, _, size, _) = queries.shape, sub_keys.shape
    check_tensor("queries", queries, None, (num_tokens, num_heads, 2, width))
    check_tensor("sub_keys", sub_keys, None, (1 if num_sets == 1 else max(num_heads, 1), 2, size, width))
    return num_tokens, num_heads, num_sets, size, width


def _check_memory(status):
    if status < 0:
        raise MemoryError("Out of memory in a C kernel.")
