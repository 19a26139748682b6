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
"""
Tensor parallelism of what PEER adds to a decoder: of the expert tables each rank holds a slice of the width of every
row; routers are replicated.
"""

import contextlib

import torch

from .expert_table import refuse_quantized
from .factored_gradient import let_follow
from .library_releases import PARALLEL_STYLES, TensorParallelLayer, require_transformers


if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def shard_columns(module: torch.nn.Module, param: str, mesh: "DeviceMesh") -> None:
    """Replace a parameter of a module, which is the same on all processes of a mesh, by this process's columns."""
    refuse_quantized(module, "Tensor parallelism")
    weight = module._parameters[param]
    module._parameters[param] = torch.nn.Parameter(
        distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=None), requires_grad=weight.requires_grad
    )


class ExpertTableParallel(TensorParallelLayer):
    """A table sharded along the embedding dimension, run on local tensors: only `[T, A]` and `[T, d]` cross ranks."""

    def validate_param(self, module, param, mesh, parameter_name=None):
        require_transformers("5.23", "Tensor parallelism of experts")

    def should_use_local_tensors(self, module):
        return True

    @contextlib.contextmanager
    def context_around_forward(self, module, mesh):
        table = module.weight
        with super().context_around_forward(module, mesh):
            let_follow(table, module.weight)
            yield

    def shard_param(self, module, param, mesh):
        shard_columns(module, param, mesh)


class ExpertUpProjectionParallel(ExpertTableParallel):
    """Each rank multiplies its slice of the hidden states; the dot products are summed over ranks."""

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        hidden_states, indices = args
        local = DTensor.from_local(hidden_states, mesh, [Replicate()], run_check=False)
        return (local.redistribute(placements=[Shard(-1)]).to_local(), indices), kwargs

    def transform_output_post_forward(self, module, output, mesh):
        partial = DTensor.from_local(output, mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()


class ExpertDownProjectionParallel(ExpertTableParallel):
    """Each rank sums its slice of the rows; the slices are gathered."""

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        weights, indices = args
        # The weights are the same on every rank, their gradient is each rank's share of it.
        replicated = DTensor.from_local(weights, mesh, [Replicate()], run_check=False)
        return (replicated.to_local(grad_placements=[Partial()]), indices), kwargs

    def transform_output_post_forward(self, module, output, mesh):
        shape = torch.Size((*output.shape[:-1], module.embedding_dim))
        # The width may not be a multiple of the number of ranks: shape and strides are those of the whole.
        strides = torch.empty(shape, device="meta").stride()
        sharded = DTensor.from_local(output, mesh, [Shard(-1)], run_check=False, shape=shape, stride=strides)
        return sharded.redistribute(placements=[Replicate()]).to_local()


class QueryNormParallel(TensorParallelLayer):
    """A query norm on ranks that all see the same batch; a BatchNorm has to know, as it sums over all ranks."""

    def install_forward(self, module, mesh):
        module.num_replicas = mesh.size()
        return module


def register_parallel_styles() -> None:
    """Make the styles known under the names that the `tp_plan` of feed-forward variants uses."""
    if torch.distributed.is_available() and PARALLEL_STYLES is not None:
        PARALLEL_STYLES.register("expert_up_projection", ExpertUpProjectionParallel())
        PARALLEL_STYLES.register("expert_down_projection", ExpertDownProjectionParallel())
        PARALLEL_STYLES.register("query_norm", QueryNormParallel())
