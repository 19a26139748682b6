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
"""Sparse gradients of expert tables: equal to dense ones, and refused where they are not possible."""

import pytest
import torch
import torch.distributed as dist
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from modeling_peer import PeerForCausalLM, expert_table
from modeling_peer.sparse_gradients import check_sparse_gradients, enable_sparse_norms


class TestSparseGradients:
    def test_of_a_model_equal_the_dense_ones(self):
        model = tiny_model(tiny_config("peer", "pkm", "peer", share_experts_across_layers=True)).double().train()
        tokens, grads = random_tokens(3, 9), []
        for sparse in (False, True):
            model.config.sparse_expert_gradients = sparse
            model.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for name, dense in grads[0].items():
            is_table = any(part in name for part in ("expert_pool", "values"))
            assert grads[1][name].is_sparse == is_table
            torch.testing.assert_close(grads[1][name].to_dense(), dense, rtol=1e-12, atol=1e-15)

    def test_the_literal_experts_have_them_too(self):
        model = tiny_model(tiny_config(expert_kernels="eager", sparse_expert_gradients=True)).train()
        tokens = random_tokens(3, 9)
        model(tokens, labels=tokens).loss.backward()
        assert model.model.layers[0].mlp.expert_pool.up_proj.weight.grad.is_sparse

    def test_the_norm_is_that_of_the_dense_gradient(self):
        enable_sparse_norms()
        gradient = torch.sparse_coo_tensor(
            [[0, 2, 0]], torch.randn(3, 4, dtype=torch.float64), (5, 4), check_invariants=True
        )
        for order in (2, 1, float("inf")):
            actual = torch.linalg.vector_norm(gradient, order)
            torch.testing.assert_close(actual, torch.linalg.vector_norm(gradient.to_dense(), order))

    @pytest.mark.parametrize("kernels", ["cpu", "eager"])
    def test_norms_come_with_the_first_table_that_needs_them(self, kernels, monkeypatch):
        """Set on a live configuration, and by a layer alone, which no model checks."""
        enabled = []
        monkeypatch.setattr(expert_table, "enable_sparse_norms", lambda: enabled.append(True))
        model = tiny_model(tiny_config(expert_kernels=kernels)).train()
        layer, hidden_states = model.model.layers[0].mlp, torch.randn(1, 3, 24)
        layer(hidden_states)
        assert not enabled
        model.config.sparse_expert_gradients = True
        layer(hidden_states)
        assert enabled

    def test_refused_where_torch_compiles(self):
        torch._dynamo.reset()
        model = tiny_model(tiny_config(sparse_expert_gradients=True)).train()
        tokens = random_tokens(2, 5)
        with pytest.raises(Exception, match=r"sparse_expert_gradients.*torch\.compile.*False"):
            torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens)
        compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():  # nothing to refuse
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)

    @pytest.fixture
    def one_process(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    def test_refused_under_fsdp2(self, one_process):
        model = PeerForCausalLM(tiny_config(sparse_expert_gradients=True))
        fully_shard(model.model.layers[0], mesh=one_process)
        tokens = random_tokens(2, 5)
        with pytest.raises(ValueError, match=r"sparse_expert_gradients.*FSDP2.*set it to False"):
            model.train()(tokens, labels=tokens)
        model.config.sparse_expert_gradients = False
        model(tokens, labels=tokens).loss.backward()

    def test_refused_where_tables_are_split(self, one_process):
        model = PeerForCausalLM(tiny_config(sparse_expert_gradients=True))
        table = model.model.layers[0].mlp.expert_pool.up_proj
        table.weight = torch.nn.Parameter(distribute_tensor(table.weight.data, one_process, [Shard(1)]))
        with pytest.raises(ValueError, match=r"sparse_expert_gradients.*tensor parallelism.*set it to False"):
            check_sparse_gradients(model.model)

    def test_modules_are_walked_in_a_process_group_alone(self, monkeypatch):
        model = PeerForCausalLM(tiny_config(sparse_expert_gradients=True)).model
        monkeypatch.setattr(model, "modules", lambda: pytest.fail("walked"))
        check_sparse_gradients(model)

    def test_refused_under_nccl(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_backend", lambda: "cpu:gloo,cuda:nccl")
        with pytest.raises(ValueError, match=r"sparse_expert_gradients.*NCCL.*set it to False"):
            check_sparse_gradients(PeerForCausalLM(tiny_config(sparse_expert_gradients=True)))
