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
"""Row-sparse gradients of expert tables: what PyTorch lacks for them, and where they are not possible."""

import functools
from typing import Any

import torch
import torch.distributed as dist

from .library_releases import has_kernel


def rows_and_values(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the rows of a row-sparse gradient, each once and ascending, `(num_rows,)`, and their values `(num_rows,
    width)`.

    Autograd does not pass on that a gradient is coalesced; where the rows ascend, nothing is sorted or copied.
    """
    rows = gradient._indices()[0]
    if gradient.sparse_dim() != 1 or not (rows.diff() > 0).all():
        gradient = gradient.coalesce()
    return gradient._indices()[0], gradient._values()


# The cache holds the library for the life of the process: its registrations end with it.
@functools.cache
def enable_sparse_norms() -> torch.library.Library | None:
    """
    Give `torch.linalg.vector_norm` an implementation for sparse tensors, which PyTorch 2.13 lacks: `clip_grad_norm_`,
    which `Trainer` calls at every step, needs it.

    It is registered for the whole process, and hence only when a table with `sparse_expert_gradients` runs.
    """
    if has_kernel("aten::linalg_vector_norm", "SparseCPU"):
        return None

    def vector_norm(gradient, ord=2, dim=None, keepdim=False, *, dtype=None):
        if dim is not None or keepdim:
            raise NotImplementedError("The norm of a sparse tensor is taken over all of it: `dim` must be `None`.")
        return torch.linalg.vector_norm(rows_and_values(gradient)[1], ord, dtype=dtype)

    library = torch.library.Library("aten", "IMPL")
    for key in ("SparseCPU", "SparseCUDA"):
        library.impl("linalg_vector_norm", vector_norm, key)
    return library


def check_sparse_gradients(model: Any) -> None:
    """
    Raise `ValueError` if `config.sparse_expert_gradients` of a base model, or of a graft, is True where gradients
    cannot be sparse.

    To be called before a training forward. Modules are walked only in a process group.
    """
    if not model.config.sparse_expert_gradients:
        return
    obstacle = None
    if torch.compiler.is_compiling():
        obstacle = "`torch.compile` does not trace sparse gradients"
    elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and "nccl" in dist.get_backend():
        obstacle = "NCCL does not reduce sparse gradients"
    elif dist.is_available() and dist.is_initialized():
        # Without a process group nothing is sharded. With one, FSDP2 or tensor parallelism may be applied between any
        # two forwards and leaves no other sign than its modules and parameters, so each forward looks at all of them.
        obstacle = _sharding_obstacle(model)
    if obstacle is not None:
        raise ValueError(
            f"`sparse_expert_gradients` is True, but {obstacle}: set it to False in the configuration. Dense "
            "gradients work there, and `RowAdamW` updates the same rows."
        )


def _sharding_obstacle(model):
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "FSDP2 does not shard sparse gradients"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "tensor parallelism does not shard sparse gradients"
    return None
