# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Costs counted from a configuration are those of the model that is built from it."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_peer import (
    FeedForwardInterface,
    PartCosts,
    PeerConfig,
    PeerForCausalLM,
    configuration_path,
    dequantize_experts,
    list_configurations,
    model_costs,
    quantize_experts,
)
from modeling_peer.feed_forward import DenseFeedForward


BATCH_SIZE, SEQUENCE_LENGTH = 2, 24

VARIANTS = {
    "dense": {"feed_forward_types": ["dense", "dense", "dense"]},
    "attention bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True, "feed_forward_types": ["dense", "dense", "dense"]},
    "moe": {"feed_forward_types": ["dense", "moe", "dense"]},
    "pkm": {"feed_forward_types": ["dense", "pkm", "dense"]},
    "peer": {},
    "gated": {"gated_experts": True},
    "no query norm": {"query_norm": None},
    "rms query norm": {"query_norm": "rms"},
    "sub-keys per head": {"sub_keys_per_head": True},
    "shared expert": {"shared_expert_intermediate_size": 48},
    "own pools": {"feed_forward_types": ["peer", "dense", "peer"]},
    "shared pool": {"feed_forward_types": ["peer", "dense", "peer"], "share_experts_across_layers": True},
    "grown": {
        "expert_additions": [
            {"layers": [1], "mode": "open", "num_experts": 41},
            {
                "layers": [1],
                "mode": "protected",
                "num_experts": 15**2,
                "num_retrieval_heads": 2,
                "num_experts_per_head": 3,
            },
        ]
    },
    "shared pool grown": {
        "feed_forward_types": ["peer", "dense", "peer"],
        "share_experts_across_layers": True,
        "expert_additions": [
            {
                "layers": [0, 2],
                "mode": "protected",
                "num_experts": 60**2,
                "num_retrieval_heads": 2,
                "num_experts_per_head": 3,
            }
        ],
    },
    "pool without layer": {"feed_forward_types": ["dense", "pkm", "dense"], "share_experts_across_layers": True},
}


def small_config(**kwargs):
    """A model no two sizes of which are the same, its attention wider than its hidden states."""
    return PeerConfig(
        **{
            "vocab_size": 160,
            "hidden_size": 56,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_experts": 20**2,
            "num_retrieval_heads": 3,
            "num_experts_per_head": 4,
            "query_size": 32,
            "moe_num_experts": 5,
            "moe_num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            **kwargs,
        },
    )


@pytest.fixture(params=VARIANTS)
def config(request):
    return small_config(**VARIANTS[request.param])


class TestFlops:
    def test_equal_those_that_torch_counts(self, config):
        config.expert_kernels = "eager"  # torch counts nothing inside an operator of ours
        model = PeerForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
        input_ids = torch.randint(config.vocab_size, (BATCH_SIZE, SEQUENCE_LENGTH))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(input_ids, use_cache=False)
        num_tokens = BATCH_SIZE * SEQUENCE_LENGTH
        costs = model_costs(config, SEQUENCE_LENGTH)

        # Torch counts the outer product of the rotary embedding besides.
        assert costs.flops == pytest.approx(counter.get_total_flops() / num_tokens, rel=1e-3)
        for layer_idx, layer in enumerate(costs.feed_forwards):
            counted = counter.get_flop_counts()[f"PeerForCausalLM.model.layers.{layer_idx}.mlp"]
            assert layer.flops * num_tokens == sum(counted.values())

    def test_grow_with_the_sequence_by_attention_alone(self):
        config = small_config(max_position_embeddings=64)
        short, long = model_costs(config, 32), model_costs(config)
        assert long.flops - short.flops == 3 * 4 * (64 - 32) * 6 * 12
        assert {**long.parts, "attention": short.parts["attention"]} == short.parts


class TestParameters:
    def test_equal_those_of_the_model(self, config):
        assert model_costs(config).parameters == PeerForCausalLM(config).num_parameters()

    def test_active_are_those_that_a_token_reads(self, config):
        """Rows that no token of a one-token forward reads get no gradient; everything else gets one."""
        torch.manual_seed(0)
        model = PeerForCausalLM._from_config(config, experts_implementation="eager").train(False)
        model(torch.tensor([[3]])).logits.square().sum().backward()
        read = 0
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if "embed_tokens" in name or "expert_pool" in name or "values" in name:
                read += gradient.any(-1).sum().item() * config.hidden_size
            elif ".experts." in name:
                read += gradient.flatten(1).any(-1).sum().item() * parameter[0].numel()
            else:
                read += parameter.numel()
        active = model_costs(config).active_parameters
        assert read <= active
        # Heads, and layers of one pool, may have retrieved the same expert.
        retrieves = {"peer", "pkm"} & set(config.feed_forward_types)
        assert read == pytest.approx(active, rel=0.01 if retrieves else 0)

    def test_active_are_no_more_than_there_are(self):
        config = small_config(num_experts=16, num_retrieval_heads=8, feed_forward_types=["peer"] * 3)
        layer = model_costs(config).feed_forwards[0]
        assert layer.active_parameters == layer.parameters
        shared = model_costs(small_config(**config.to_diff_dict() | {"share_experts_across_layers": True}))
        pool = shared.parts["shared expert pool"]
        assert pool.active_parameters == pool.parameters == 2 * 16 * 56


class TestMemory:
    def test_of_two_tables_of_a_million_rows(self):
        """2.15 B parameters of 1024 columns: 34 GB as float32 weights, gradients and two moments."""
        costs = model_costs(PeerConfig(hidden_size=1024, num_attention_heads=16))
        share = costs.feed_forwards[5].parameters / costs.parameters
        assert share * costs.training_bytes == pytest.approx(16 * 2 * 1024**2 * 1024, rel=5e-3)
        assert costs.optimizer_bytes == 2 * costs.gradient_bytes == 2 * costs.weight_bytes

    def test_follows_the_data_type(self, tmp_path):
        """Also of a model that was saved, which makes the data type of its configuration a string."""
        assert model_costs(small_config()).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float64):
            config = small_config(dtype=dtype)
            costs = model_costs(small_config(), dtype=dtype)
            assert costs == model_costs(config)
            assert costs.training_bytes == 4 * costs.parameters * dtype.itemsize
            assert costs.weight_bytes_read == costs.active_parameters * dtype.itemsize
            PeerForCausalLM(config).to(dtype).save_pretrained(tmp_path)
            assert model_costs(config) == costs


class TestQuantizedTables:
    @pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "group_size": 6}], ids=str)
    @pytest.mark.parametrize("variant", ["gated", "pkm", "grown", "shared pool grown"])
    def test_take_the_bytes_that_they_are_stored_in(self, variant, options):
        model = PeerForCausalLM(small_config(**VARIANTS[variant]))
        before = model_costs(model.config)
        costs = model_costs(quantize_experts(model, **options).config)
        assert costs.weight_bytes == sum(each.numel() * each.element_size() for each in model.parameters())
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        assert (costs.gradient_bytes, costs.optimizer_bytes) == (4 * trained, 8 * trained)
        assert (costs.flops, costs.parameters) == (before.flops, before.parameters)
        assert model_costs(dequantize_experts(model).config) == before

    def test_are_read_row_by_row(self):
        config = small_config(gated_experts=True, dtype=torch.bfloat16)
        before = model_costs(config)
        config.quantization_config = {"quant_method": "peer", "bits": 4, "group_size": 16}
        num_rows, row, quantized_row = 3 * 12, 56 * 2, 56 // 2 + 4 * 2  # four scales, the last of 8 columns
        costs = model_costs(config)
        assert costs.weight_bytes_read == before.weight_bytes_read - num_rows * (row - quantized_row)
        config.quantization_config = {"quant_method": "quanto", "weights": "int8"}  # is not counted
        assert model_costs(config) == before


def test_the_table_names_every_part_and_its_share():
    costs = model_costs(PeerConfig(gated_experts=True, share_experts_across_layers=True))
    rows = {line.split("  ")[0]: line.split()[-3:] for line in str(costs).splitlines()}
    dense = 11 * 3 * 768 * 2048
    assert rows["feed-forward dense x 11"] == [f"{2 * dense / 1e6:.3f}", f"{dense:,}", f"{dense:,}"]
    assert rows["shared expert pool"] == ["0.000", f"{3 * 1024**2 * 768:,}", f"{3 * 128 * 768:,}"]
    assert rows["total"] == [f"{costs.flops / 1e6:.3f}", f"{costs.parameters:,}", f"{costs.active_parameters:,}"]
    assert rows["training, before activations"][1:] == [f"{costs.training_bytes / 2**20:,.2f}", "MiB"]


def test_a_registered_variant_counts_itself(monkeypatch):
    class Custom(nn.Module):
        @staticmethod
        def count_costs(config, layer_idx):
            return PartCosts(flops=10 * layer_idx, parameters=5, active_parameters=config.hidden_size)

    class OfUnknownCost(DenseFeedForward):
        """A subclass may cost anything."""

    monkeypatch.setitem(FeedForwardInterface._global_mapping, "custom", Custom)
    monkeypatch.setitem(FeedForwardInterface._global_mapping, "unknown", OfUnknownCost)
    costs = model_costs(small_config(feed_forward_types=["dense", "dense", "custom"]))
    assert costs.feed_forwards[2] == PartCosts(20, 5, 56)
    without = model_costs(small_config(feed_forward_types=["dense", "dense", "dense"]))
    assert costs.parameters == without.parameters - without.feed_forwards[2].parameters + 5
    with pytest.raises(ValueError, match="count_costs"):
        model_costs(small_config(feed_forward_types=["dense", "peer", "unknown"]))


@pytest.mark.parametrize("size", ["tiny", "paper"])
def test_named_twins_take_equally_many_flops(size):
    twins = [name for name in list_configurations() if name.endswith(f"-{size}")]
    assert len(twins) == 4
    flops = [model_costs(PeerConfig.from_pretrained(configuration_path(name))).flops for name in twins]
    assert max(flops) <= 1.02 * min(flops)
