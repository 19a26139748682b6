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
"""What training on many GPUs moves and keeps is what the formulas, the model and the code that moves it say."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from preloaded import python
from test_costs import VARIANTS, small_config
from tiny_models import tiny_config

from modeling_peer import PeerConfig, PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.analysis.collectives import GROUP_COLLECTIVES, Ranks, memory_group_bytes
from modeling_peer.analysis.communication import Kept, communication_costs
from modeling_peer.analysis.costs import model_costs
from modeling_peer.expert_table import ExpertTable
from modeling_peer.library_releases import is_at_least


DESIGNS = ("ddp", "ddp_factors", "fsdp2", "tensor_parallel", "memory_group", "memory_group_fsdp2")


def hand_worked_config(**fields):
    """One layer of d = 8, V = 10, N = 256 and A = 6: 4,096 elements of tables, 568 of the rest."""
    sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 256, "num_retrieval_heads": 2, "num_experts_per_head": 3, "query_size": 4}
    types = {"feed_forward_types": ["peer"], "query_norm": None}
    return PeerConfig(**{**sizes, **experts, **types, **fields})


def hand_worked_costs(num_ranks=4, **arguments):
    """Of 6 tokens for each rank and step, in two micro-batches, in float32."""
    return communication_costs(hand_worked_config(), num_ranks, tokens_per_rank=3, micro_batches=2, **arguments)


def received(design):
    return {(each.name, each.operation): each.num_bytes for each in design.received}


class TestGroupBytes:
    def test_of_the_case_in_the_docs(self):
        """d = 2,048, A = 128, G = 8, bf16: 28,672 bytes for each token."""
        sizes = memory_group_bytes(2048, 128, 8, 2)
        columns = 7 * 2048 // 8 * 2
        assert columns == 7 * 128 * 4 == 3584
        assert sizes == {
            "indices": 3584,
            "hidden states": 3584,
            "dot products": 3584,
            "weighted activations": 1792,
            "outputs": 3584,
            "output gradients": 3584,
            "weight gradients": 3584,
            "neuron gradients": 1792,
            "hidden state gradients": 3584,
        }
        assert sum(sizes.values()) == 28_672
        assert list(sizes) == list(GROUP_COLLECTIVES)

    @pytest.mark.parametrize("num_up_projections", [0, 1, 2])
    @pytest.mark.parametrize("group_size", [1, 2, 4])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_are_those_of_the_tensors_that_ranks_exchange(self, group_size, num_up_projections, dtype):
        """Counted as rank 0 would: bytes of what each other rank gives it."""
        num_tokens, width, num_active = 5, 16, 6
        sums = torch.promote_types(dtype, torch.float32)
        others = range(1, group_size)

        def to_columns(*shape):  # rank 0 gets its columns of the tokens of every other rank
            return sum(torch.empty(shape, dtype=dtype).chunk(group_size, dim=-1)[0].nbytes for _ in others)

        def to_tokens(*shape):  # rank 0 gets the columns of every other rank, of its own tokens
            return sum(torch.empty(shape, dtype=dtype).chunk(group_size, dim=-1)[other].nbytes for other in others)

        def gathered(dtype):
            return sum(torch.empty(num_tokens, num_active, dtype=dtype).nbytes for _ in others)

        def partial_sums():  # each other rank has partial sums for all tokens of the group, and gives those of rank 0
            partial = torch.empty(group_size * num_tokens, num_active, dtype=sums)
            return sum(partial.chunk(group_size)[0].nbytes for _ in others)

        tokens = (num_tokens, width)
        has_neurons = num_up_projections > 0
        sizes = memory_group_bytes(width, num_active, group_size, dtype.itemsize, num_up_projections)
        assert {name: size * num_tokens for name, size in sizes.items()} == {
            "indices": gathered(torch.int32),
            "hidden states": has_neurons * to_columns(*tokens),
            "dot products": num_up_projections * partial_sums(),
            "weighted activations": gathered(dtype),
            "outputs": to_tokens(*tokens),
            "output gradients": to_columns(*tokens),
            "weight gradients": partial_sums(),
            "neuron gradients": num_up_projections * gathered(dtype),
            "hidden state gradients": has_neurons * to_tokens(*tokens),
        }

    def test_of_a_group_of_one_are_none(self):
        assert not any(memory_group_bytes(2048, 128, 1, 2, 2).values())

    def test_follow_the_group_as_the_collectives_do(self):
        """What is gathered grows with G − 1; what is exchanged is (G − 1) / G of a token."""
        two, eight = (memory_group_bytes(2048, 128, size, 2) for size in (2, 8))
        for name, (_, operation) in GROUP_COLLECTIVES.items():
            assert two[name] * (7 / 4 if operation == "all-to-all" else 7) == eight[name]


class TestLinks:
    """By hand: of what another node has, each rank of a node gets its share by network."""

    def test_of_a_gather_in_two_nodes(self):
        found = Ranks(2, 4).all_gather("", 10)
        assert (found.network_bytes, found.node_bytes) == (10, 60)

    @pytest.mark.parametrize(("num_nodes", "per_node"), [(1, 1), (1, 8), (8, 1), (3, 4)])
    def test_carry_what_a_rank_receives(self, num_nodes, per_node):
        ranks = Ranks(num_nodes, per_node)
        gathered, scattered = ranks.all_gather("", 24), ranks.reduce_scatter("", 24)
        assert gathered.num_bytes == scattered.num_bytes == 24 * (ranks.total - 1)
        reduced = ranks.all_reduce("", 24 * ranks.total, 1)
        assert reduced.num_bytes == 2 * gathered.num_bytes
        assert bool(gathered.network_bytes) == (num_nodes > 1)
        assert bool(gathered.node_bytes) == (per_node > 1)
        # All ranks of a node together get from the network what the other nodes have.
        assert gathered.network_bytes * per_node == 24 * per_node * (num_nodes - 1)

    def test_of_uneven_parts_are_padded(self):
        assert Ranks(1, 4).all_reduce("", 5, 2).num_bytes == 2 * 3 * 2 * 2

    def test_the_slower_one_decides(self):
        costs = hand_worked_costs(ranks_per_node=2, node_bandwidth=100, network_bandwidth=10)
        gradients = costs["ddp"].received[0]
        assert (gradients.node_bytes, gradients.network_bytes) == (2 * 2 * 4096, 2 * 4096)
        assert gradients.seconds(100, 10) == 2 * 4096 / 10
        assert gradients.seconds(100, 1e9) == 2 * 2 * 4096 / 100
        assert costs["ddp"].seconds == sum(each.seconds(100, 10) for each in costs["ddp"].received)


class TestHandWorked:
    """Four ranks in a node, 6 tokens each: 36 entries."""

    rest = 2 * 3 * 142 * 4  # 568 elements in four parts

    def test_ddp(self):
        design = hand_worked_costs()["ddp"]
        assert received(design) == {
            ("gradients of tables", "all-reduce"): 2 * 3 * 1024 * 4,
            ("gradients of the rest", "all-reduce"): self.rest,
        }
        # Two moments, and a count for each of 512 rows.
        assert design.tables == Kept(16384, 16384, 2 * 16384 + 512 * 4)
        assert design.rest == Kept(2272, 2272, 4544)

    def test_ddp_with_factors(self):
        design = hand_worked_costs()["ddp_factors"]
        # Of each of two tables 6 tokens and 36 coefficients, and once 36 pairs of index and token.
        assert received(design) == {
            ("factors of tables", "all-gather"): 3 * (2 * (6 * 8 + 36) * 4 + 36 * 8),
            ("gradients of the rest", "all-reduce"): self.rest,
        }
        assert design.tables == Kept(16384, 4 * (2 * (6 * 8 + 36) * 4 + 36 * 8), 2 * 16384 + 512 * 4)

    def test_fsdp2(self):
        """Gathered in each of two micro-batches, forward and backward."""
        design = hand_worked_costs()["fsdp2"]
        tables, rest = 2 * 3 * 1024 * 4, 2 * 3 * 142 * 4
        assert received(design) == {
            ("parameters of tables, forward", "all-gather"): tables,
            ("parameters of tables, backward", "all-gather"): tables,
            ("gradients of tables", "reduce-scatter"): tables,
            ("parameters of the rest, forward", "all-gather"): rest,
            ("parameters of the rest, backward", "all-gather"): rest,
            ("gradients of the rest", "reduce-scatter"): rest,
        }
        assert design.tables == Kept(4096, 4096, 2 * 4096 + 128 * 4)
        assert design.rest == Kept(568, 568, 1136)

    def test_tensor_parallelism(self):
        """A group runs the 24 tokens of its four ranks, of which each rank holds a quarter of what is split."""
        design = hand_worked_costs()["tensor_parallel"]
        summed = (
            8 + 8 + 3 * 8 + 8
        )  # of a token: embedding, output of attention; gradients of its inputs, and the LM head's
        assert received(design) == {
            ("hidden states of the rest", "all-reduce"): 2 * 3 * (24 * summed // 4) * 4,
            ("logits", "all-gather"): 3 * 6 * 10 * 4,
            ("dot products", "all-reduce"): 2 * 3 * (24 * (6 + 6) // 4) * 4,
            ("outputs and hidden state gradients", "all-gather"): 3 * 6 * (8 + 8) * 4,
        }
        # Factors of two columns of 24 tokens.
        assert design.tables == Kept(4096, 2 * (24 * 2 + 144) * 4 + 144 * 8, 2 * 4096 + 512 * 4)
        own = (256 + 80 + 80) // 4 + 152  # attention, embedding and LM head split, norms and router not
        assert design.rest == Kept(own * 4, own * 4, own * 8)

    def test_a_memory_group(self):
        costs = hand_worked_costs()
        design = costs["memory_group"]
        gathered, exchanged = 6 * 3 * 6 * 4, 6 * 3 * 2 * 4
        assert received(design) == {
            ("indices", "all-gather"): gathered,
            ("hidden states", "all-to-all"): exchanged,
            ("dot products", "reduce-scatter"): gathered,
            ("weighted activations", "all-gather"): gathered,
            ("outputs", "all-to-all"): exchanged,
            ("output gradients", "all-to-all"): exchanged,
            ("weight gradients", "reduce-scatter"): gathered,
            ("neuron gradients", "all-gather"): gathered,
            ("hidden state gradients", "all-to-all"): exchanged,
            ("gradients of the rest", "all-reduce"): self.rest,
        }
        assert design.tables == costs["tensor_parallel"].tables
        assert design.rest == costs["ddp"].rest

    def test_two_memory_groups_in_two_nodes(self):
        """Two ranks have the same four columns, and the factors of 12 tokens each."""
        design = hand_worked_costs(ranks_per_node=2)["memory_group"]
        links = {each.name: (each.node_bytes, each.network_bytes) for each in design.received}
        assert links["factors of tables"] == (0, 2 * (12 * 4 + 72) * 4 + 72 * 8)
        assert links["gradients of the rest"] == (2 * 2 * 142 * 4, 2 * 142 * 4)
        assert links["hidden states"] == (6 * 4 * 4, 0)
        assert design.tables.gradients == 2 * (2 * (12 * 4 + 72) * 4 + 72 * 8)

    def test_two_memory_groups_in_a_node(self):
        design = hand_worked_costs(group_size=2)["memory_group"]
        links = {each.name: (each.node_bytes, each.network_bytes) for each in design.received}
        assert links["factors of tables"] == (2 * (12 * 4 + 72) * 4 + 72 * 8, 0)

    def test_a_dense_sum_where_that_is_fewer_bytes(self):
        """Of 60 tokens and 360 entries for each of four ranks, where a table has 2,048 elements."""
        costs = communication_costs(hand_worked_config(), 4, 2, tokens_per_rank=60)
        assert received(costs["ddp_factors"]) == received(costs["ddp"])
        names = dict(received(costs["memory_group"]))
        assert names["gradients of tables", "all-reduce"] == 2 * 1 * 4096 // 4 * 4
        assert costs["memory_group"].tables.gradients == 4096 // 2 * 4

    def test_factors_that_outgrow_the_rows(self):
        """After eight micro-batches of 20 tokens, the factors of 256 rows of 8 columns are summed to these rows."""

        def gradients(micro_batches):
            costs = communication_costs(hand_worked_config(), 1, tokens_per_rank=20, micro_batches=micro_batches)
            return costs["ddp_factors"].tables.gradients

        def size(num_tokens, num_entries):
            return 2 * (num_tokens * 8 + num_entries) * 4 + num_entries * 8

        # Of a table (20 · 8 + 120) · 4 + 120 · 8 = 2,080 bytes; those of its rows are 256 · 8 · 4, twice that 16,384.
        assert [gradients(number) for number in (1, 7)] == [size(20, 120), size(140, 840)]
        assert gradients(8) == size(256, 256)
        assert gradients(9) == size(276, 376)

    def test_a_memory_group_with_the_rest_under_fsdp2(self):
        costs = hand_worked_costs()
        design = costs["memory_group_fsdp2"]
        of_group = {key: size for key, size in received(costs["memory_group"]).items() if "rest" not in key[0]}
        of_rest = {key: size for key, size in received(costs["fsdp2"]).items() if "rest" in key[0]}
        assert received(design) == of_group | of_rest
        assert (design.tables, design.rest) == (costs["memory_group"].tables, costs["fsdp2"].rest)

    def test_gated_experts_and_values(self):
        def totals(**fields):
            costs = communication_costs(hand_worked_config(**fields), 4, tokens_per_rank=6)
            return received(costs["memory_group"])

        plain, gated, values = totals(), totals(gated_experts=True), totals(feed_forward_types=["pkm"])
        for key in plain:
            times = 2 if key[0] in ("dot products", "neuron gradients") else 1
            if "rest" not in key[0]:
                assert gated[key] == times * plain[key]
        without = {key for key in plain if key not in values}
        assert {name for name, _ in without} == {
            "hidden states",
            "dot products",
            "neuron gradients",
            "hidden state gradients",
        }
        assert all(values[key] == plain[key] for key in values if "rest" not in key[0])

    def test_every_pool_and_layer_is_counted(self):
        """Three layers of one pool exchange thrice as much; an added generation as much as it retrieves."""

        def indices(**fields):
            config = tiny_config("peer", "dense", "peer", "peer", **fields)
            return received(communication_costs(config, 4, tokens_per_rank=6)["memory_group"])["indices", "all-gather"]

        own = indices()
        assert own == 3 * 6 * 3 * 6 * 4
        assert indices(share_experts_across_layers=True) == own
        sizes = {"num_experts": 16, "num_retrieval_heads": 1, "num_experts_per_head": 2}
        added = {"expert_additions": [{"layers": [0, 2, 3], "mode": "protected", **sizes}]}
        assert indices(**added) == own + 3 * 6 * 3 * 2 * 4
        assert indices(share_experts_across_layers=True, **added) == own + 3 * 6 * 3 * 2 * 4


@pytest.fixture(params=VARIANTS)
def config(request):
    return small_config(**VARIANTS[request.param])


class TestModels:
    """`model_costs` and models that are built have as many parameters."""

    def test_all_of_them_are_kept(self, config):
        costs = communication_costs(config, 8)
        model = PeerForCausalLM(config)
        tables = {module.weight for module in model.modules() if isinstance(module, ExpertTable)}
        num_tables = sum(table.numel() for table in tables)
        for name in ("ddp", "ddp_factors"):
            assert costs[name].tables.parameters == num_tables * 4
            assert costs[name].rest.parameters == (model.num_parameters() - num_tables) * 4
        whole = costs["ddp"]
        assert whole.tables.parameters + whole.rest.parameters == model_costs(config).weight_bytes
        for name, num_shards in (("fsdp2", 8), ("memory_group", 8), ("memory_group_fsdp2", 8)):
            assert costs[name].tables.parameters * num_shards == whole.tables.parameters
        assert costs["memory_group"].rest == whole.rest
        assert costs["fsdp2"].rest.parameters == -(-(model.num_parameters() - num_tables) // 8) * 4

    def test_tensor_parallelism_splits_those_of_the_plan(self, config):
        model = PeerForCausalLM(config)
        if "model.embed_tokens" not in model.tp_plan:
            pytest.skip("this release of Transformers does not split embeddings")
        kept = 0
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            styles = {
                style
                for pattern, style in model.tp_plan.items()
                for each in (name, module)
                if fnmatchcase(each, pattern)
            }
            is_split = bool(styles - {"query_norm", "moe_tp_experts"}) and (styles, leaf) != ({"rowwise"}, "bias")
            kept += parameter.numel() // (8 if is_split else 1)
        design = communication_costs(config, 8)["tensor_parallel"]
        assert design.tables.parameters + design.rest.parameters == kept * 4

    @pytest.mark.skipif(not is_at_least("Transformers", "5.24"), reason="plans are those of Transformers 5.24")
    def test_tensor_parallelism_moves_what_its_collectives_do(self, tmp_path):
        names = ["dense", "moe", "pkm", "gated", "shared expert", "shared pool grown"]
        script = Path(__file__).with_name("collectives_of_tensor_parallelism.py")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([python(), script, tmp_path, *names], env=environment, check=True)
        found = json.loads((tmp_path / "received.json").read_text())
        assert list(found) == names
        for name, sizes in found.items():
            config = small_config(**VARIANTS[name], query_norm=None)
            counted = Counter()
            for each in communication_costs(config, 2, tokens_per_rank=16)["tensor_parallel"].received:
                counted[each.operation] += each.num_bytes
            assert counted == sizes, name

    def test_state_is_that_of_the_optimizer(self, config):
        """`RowAdamW`, less the steps of whole parameters."""
        model = PeerForCausalLM(config)
        optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-3))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tables = {id(module.weight) for module in model.modules() if isinstance(module, ExpertTable)}
        sizes = {True: 0, False: 0}
        for parameter, state in optimizer.state.items():
            sizes[id(parameter) in tables] += sum(value.nbytes for value in state.values() if value.ndim)
        design = communication_costs(config, 1)["ddp"]
        assert (design.tables.optimizer, design.rest.optimizer) == (sizes[True], sizes[False])


class TestLimits:
    @pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
    def test_one_rank_moves_nothing(self, fields):
        costs = communication_costs(small_config(**fields), 1)
        assert tuple(costs.designs) == DESIGNS
        for design in costs.designs.values():
            assert design.received == ()
            assert design.received_bytes == design.seconds == 0
            assert design.rest == costs["ddp"].rest
            assert design.tables.parameters == costs["ddp"].tables.parameters

    def test_groups_of_one_are_ddp(self):
        costs = communication_costs(small_config(), 16, group_size=1, tokens_per_rank=5)
        assert costs["memory_group"] == costs["tensor_parallel"] == costs["ddp_factors"]

    def test_a_model_without_tables(self):
        costs = communication_costs(small_config(feed_forward_types=["dense"] * 3), 8)
        assert costs["memory_group"] == costs["ddp_factors"] == costs["ddp"]
        assert costs["ddp"].tables == Kept()
        assert costs["memory_group_fsdp2"] == costs["fsdp2"]

    def test_by_default_a_group_is_a_node(self):
        assert communication_costs(small_config(), 4).group_size == 4
        assert communication_costs(small_config(), 64).group_size == 8
        assert communication_costs(small_config(), 64, ranks_per_node=4).group_size == 4

    def test_a_group_moves_no_table_and_none_of_its_gradients(self):
        """Whatever the number of experts."""
        small, large = (
            communication_costs(small_config(num_experts=side**2, query_norm=None), 8)["memory_group"]
            for side in (10, 1000)
        )
        assert [each for each in small.received if "rest" not in each.name] == [
            each for each in large.received if "rest" not in each.name
        ]


class TestMonotonicity:
    def test_in_tokens(self):
        config = small_config(gated_experts=True)
        for before, after in ((1, 2), (2, 50), (50, 10**5)):
            less, more = (communication_costs(config, 64, tokens_per_rank=tokens) for tokens in (before, after))
            for name in DESIGNS:
                assert less[name].received_bytes <= more[name].received_bytes
                assert less[name].seconds <= more[name].seconds
            assert less["fsdp2"] == more["fsdp2"]

    def test_in_micro_batches(self):
        """Only FSDP2 moves more for as many tokens in more of them."""
        config = small_config()
        one = communication_costs(config, 16, tokens_per_rank=32)
        four = communication_costs(config, 16, tokens_per_rank=8, micro_batches=4)
        for name in ("ddp", "ddp_factors", "tensor_parallel", "memory_group"):
            assert one[name] == four[name]
        assert four["fsdp2"].received_bytes == 4 * one["fsdp2"].received_bytes

    def test_in_the_size_of_a_group(self):
        costs = [communication_costs(small_config(), 8, size)["memory_group"] for size in (1, 2, 4, 8)]
        for smaller, larger in itertools.pairwise(costs):
            assert larger.tables.parameters == smaller.tables.parameters // 2
            assert larger.tables.optimizer < smaller.tables.optimizer

    def test_in_ranks(self):
        for fewer, more in ((1, 2), (2, 8), (8, 16), (16, 512)):
            less, more = (communication_costs(small_config(), ranks, 1)["fsdp2"] for ranks in (fewer, more))
            assert less.received_bytes < more.received_bytes
            assert less.kept_bytes > more.kept_bytes

    def test_in_speed(self):
        slow, fast = (communication_costs(small_config(), 64, network_bandwidth=speed) for speed in (1e9, 1e11))
        for name in DESIGNS:
            assert slow[name].seconds > fast[name].seconds
            assert slow[name].received == fast[name].received


def test_the_data_type_is_that_of_parameters_and_hidden_states():
    config = small_config(dtype=torch.bfloat16)
    half, full = (communication_costs(config, 8, tokens_per_rank=5, dtype=dtype) for dtype in (None, torch.float32))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert 2 * half["fsdp2"].received_bytes == full["fsdp2"].received_bytes
    assert half["fsdp2"].tables.optimizer == full["fsdp2"].tables.optimizer
    assert 2 * half["fsdp2"].rest.optimizer == full["fsdp2"].rest.optimizer
    names = received(half["memory_group"]), received(full["memory_group"])
    for name, operation in names[0]:
        in_float = name in ("indices", "dot products", "weight gradients")
        assert names[0][name, operation] * (1 if in_float else 2) == names[1][name, operation], name
    assert communication_costs(small_config(), 8).dtype == torch.float32


class TestTables:
    def test_of_designs(self):
        costs = hand_worked_costs()
        rows = {line.split()[0]: line.split()[1:] for line in str(costs).splitlines() if line}
        assert set(DESIGNS) < set(rows)
        large = communication_costs(PeerConfig(), 64, dtype=torch.bfloat16)
        design = large["memory_group"]
        (row,) = [line.split() for line in str(large).splitlines() if line.startswith("memory_group ")]
        sizes = (design.node_bytes / 1e9, design.network_bytes / 1e9, design.seconds)
        sizes += (design.tables.total / 1e9, design.rest.total / 1e9)
        assert row[1:] == [f"{size:,.3f}" for size in sizes]
        assert str(large).endswith("1 micro-batches of 8,192 tokens per rank, groups of 8, in bfloat16")

    def test_of_collectives(self):
        design = communication_costs(PeerConfig(), 64)["memory_group"]
        lines = str(design).splitlines()
        assert len(lines) == 1 + len(design.received)
        for line, each in zip(lines[1:], design.received, strict=True):
            assert line.startswith(each.name) and f" {each.operation} " in line
            assert line.split()[-2:] == [f"{each.node_bytes / 1e9:.3f}", f"{each.network_bytes / 1e9:.3f}"]


class TestRefusals:
    @pytest.mark.parametrize("config", [{}, None, "peer-tiny", PeerConfig])
    def test_of_what_is_no_configuration(self, config):
        with pytest.raises(ValueError, match="`config` must be a `PeerConfig`, got an object of class"):
            communication_costs(config, 8)

    @pytest.mark.parametrize("name", ["num_ranks", "group_size", "tokens_per_rank", "micro_batches", "ranks_per_node"])
    @pytest.mark.parametrize("value", [0, -8, 2.0, "8", True])
    def test_of_numbers(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got {value!r}"):
            communication_costs(small_config(), **{"num_ranks": 8, name: value})

    def test_of_nodes_that_are_not_full(self):
        with pytest.raises(
            ValueError, match="`num_ranks` must be at most `ranks_per_node` = 8 or a multiple .* got 12"
        ):
            communication_costs(small_config(), 12)

    def test_of_groups_that_do_not_fit_a_node(self):
        for size in (3, 16):
            with pytest.raises(ValueError, match=f"`group_size` must divide the ranks of a node, 8, got {size}"):
                communication_costs(small_config(), 16, size)

    def test_of_groups_that_do_not_divide_the_width(self):
        with pytest.raises(ValueError, match="`group_size` must divide `hidden_size`, 56, got 16"):
            communication_costs(small_config(), 16, 16, ranks_per_node=16)
        with pytest.raises(ValueError, match="`group_size` must divide `hidden_size`, 56, got 6"):
            communication_costs(small_config(), 6)

    def test_of_sizes_of_a_group(self):
        with pytest.raises(ValueError, match="`group_size` must divide `hidden_size`, 56, got 6"):
            memory_group_bytes(56, 12, 6, 2)
        for name, least in (("num_active", 1), ("element_bytes", 1), ("num_up_projections", 0)):
            with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least {least}, got -1"):
                memory_group_bytes(
                    **{"hidden_size": 56, "num_active": 2, "group_size": 8, "element_bytes": 2, name: -1}
                )

    @pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", 2])
    def test_of_data_types(self, dtype):
        with pytest.raises(ValueError, match=f"`dtype` must be a floating-point `torch.dtype`, got {dtype!r}"):
            communication_costs(small_config(), 8, dtype=dtype)

    @pytest.mark.parametrize("name", ["node_bandwidth", "network_bandwidth"])
    @pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "450e9", None, True])
    def test_of_speeds(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive number of bytes per second, got {value!r}"):
            communication_costs(small_config(), 8, **{name: value})


def test_costs_cannot_be_changed():
    costs = hand_worked_costs()
    with pytest.raises(dataclasses.FrozenInstanceError):
        costs.num_ranks = 5
