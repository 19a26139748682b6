# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What C would misread, it never gets: it checks nothing, and reads what an address points to."""

import pytest
import torch
from kernel_cases import experts

from modeling_peer.ops.kernels_cpu import CpuKernels
from modeling_peer.ops.kernels_torch import TorchKernels
from modeling_peer.ops.native import call
from modeling_peer.ops.quantized_rows import quantize


HIDDEN_STATES, WEIGHTS, ROWS, TABLE = experts(5, 6, 24, 36, torch.float32)
QUANTIZED = quantize(TABLE, 8, None)
NAMED, STARTS, ORDER = TorchKernels.group(ROWS.flatten(), 36)
FACTORS = {"coefficients": WEIGHTS.flatten()[ORDER], "sources": ORDER // 6, "starts": STARTS, "tokens": HIDDEN_STATES}
QUERIES = {"queries": torch.randn(5, 2, 2, 8), "sub_keys": torch.randn(1, 2, 6, 8)}

ARGUMENTS = {
    "up": {"hidden_states": HIDDEN_STATES, "rows": ROWS, "table": TABLE},
    "down": {"weights": WEIGHTS, "rows": ROWS, "table": TABLE},
    "row_gradient": {**FACTORS, "out": torch.zeros(36, 24), "places": NAMED},
    "squared_norm": FACTORS,
    "retrieve": {**QUERIES, "k": 3},
    "retrieval_gradients": {
        "gradient": torch.zeros(5, 2, 3),
        "indices": torch.zeros(5, 2, 3, dtype=torch.int64),
        **QUERIES,
    },
}

# Of a function, changes of its arguments and the name of what is refused: for each check, and each kind of tensor once.
REFUSED = [
    ("up", {"hidden_states": torch.randn(5, 20)}, "hidden_states"),
    ("up", {"hidden_states": torch.randn(5, 24, device="meta")}, "hidden_states"),
    ("up", {"table": torch.ones(36, 24, dtype=torch.int64)}, "table"),
    ("up", {"table": torch.randn(36, 24).to_sparse()}, "table"),
    ("up", {"rows": torch.zeros(5, 6, dtype=torch.int32)}, "rows"),
    ("down", {"weights": torch.randn(5, 7)}, "weights"),
    ("up", {"table": QUANTIZED, "hidden_states": torch.randn(5, 23)}, "hidden_states"),
    ("up", {"table": QUANTIZED._replace(integers=torch.zeros(36, 24))}, "integers"),
    ("up", {"table": QUANTIZED._replace(integers=torch.zeros(36, 25, dtype=torch.int8))}, "integers"),
    ("up", {"table": QUANTIZED._replace(scales=torch.ones(36, 1))}, "scales"),
    ("retrieve", {"k": -1}, "num_experts_per_head"),
    ("retrieve", {"queries": torch.randn(5, 2, 2, 8).double()}, "queries"),
    ("retrieve", {"queries": torch.randn(5, 2, 3, 8)}, "queries"),
    ("retrieve", {"sub_keys": torch.randn(2, 6, 8)}, "sub_keys"),
    ("retrieve", {"sub_keys": torch.randn(1, 2, 6, 7)}, "sub_keys"),
    ("retrieve", {"sub_keys": torch.randn(3, 2, 6, 8)}, "sub_keys"),
    ("retrieve", {"queries": torch.randn(5, 0, 2, 8), "sub_keys": torch.randn(0, 2, 6, 8)}, "sub_keys"),
    ("retrieval_gradients", {"queries": torch.randn(5, 2, 3, 8)}, "queries"),
    ("retrieval_gradients", {"gradient": torch.zeros(5, 2, 4)}, "gradient"),
    ("retrieval_gradients", {"indices": torch.zeros(4, 2, 3).long()}, "indices"),
]


@pytest.mark.parametrize("function, changes, name", REFUSED)
def test_what_is_refused(function, changes, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        getattr(CpuKernels, function)(**(ARGUMENTS[function] | changes))


@pytest.mark.parametrize("function", ["up", "down", "row_gradient", "squared_norm"])
@pytest.mark.parametrize("place", [0, 2])
def test_tensors_without_memory(function, place):
    arguments = [each.clone() for each in ARGUMENTS[function].values()]
    arguments[place].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory|not allocated"):
        getattr(CpuKernels, function)(*arguments)


def test_tensors_on_the_cpu_alone():
    """Wherever a caller made them: the address of another device is none that C could read."""
    with pytest.raises(RuntimeError):
        call("up_8", torch.empty(3, 4, device="meta"))
