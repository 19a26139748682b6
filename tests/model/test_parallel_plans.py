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
"""The plans by which Transformers splits a model over processes: those of all variants in a model."""

import json
from unittest import mock

import pytest
import torch
from tiny_models import PROTECTED, tiny_config
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from modeling_peer import (
    FeedForwardInterface,
    PeerConfig,
    PeerForCausalLM,
    PeerForSequenceClassification,
    shard_experts,
)
from modeling_peer.library_releases import FOUND_RELEASES, is_at_least


ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
DENSE = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
MOE = {
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}
QUERY_NORM = {"layers.*.mlp.router.query_norm": "query_norm"}
ADDED_QUERY_NORM = {"layers.*.mlp.added_routers.*.query_norm": "query_norm"}
VALUES = {"layers.*.mlp.values": "expert_down_projection"}
POOL = {
    "layers.*.mlp.expert_pool.up_proj": "expert_up_projection",
    "layers.*.mlp.expert_pool.down_proj": "expert_down_projection",
}
GATE = {"layers.*.mlp.expert_pool.gate_proj": "expert_up_projection"}
ADDED_POOL = {
    "layers.*.mlp.expert_pool.added.*.up_proj": "expert_up_projection",
    "layers.*.mlp.expert_pool.added.*.down_proj": "expert_down_projection",
}
ADDED_GATE = {"layers.*.mlp.expert_pool.added.*.gate_proj": "expert_up_projection"}
SHARED_POOL = {
    "expert_pool.up_proj": "expert_up_projection",
    "expert_pool.down_proj": "expert_down_projection",
}
SHARED_GATE = {"expert_pool.gate_proj": "expert_up_projection"}
ADDED_SHARED_POOL = {
    "expert_pool.added.*.up_proj": "expert_up_projection",
    "expert_pool.added.*.down_proj": "expert_down_projection",
}
ADDED_SHARED_GATE = {"expert_pool.added.*.gate_proj": "expert_up_projection"}
BRANCH = {
    "layers.*.mlp.shared_expert.gate_proj": "colwise",
    "layers.*.mlp.shared_expert.up_proj": "colwise",
    "layers.*.mlp.shared_expert.down_proj": "rowwise",
}

OPEN = {"mode": "open", "num_experts": 13, "layers": [0]}

PLANS = {
    "dense": (tiny_config("dense"), DENSE),
    "moe": (tiny_config("moe"), MOE),
    "moe_expert_choice": (tiny_config("moe", moe_routing="expert_choice"), MOE),
    "pkm": (tiny_config("pkm"), QUERY_NORM | VALUES),
    "pkm_rms": (tiny_config("pkm", query_norm="rms"), VALUES),
    "peer": (tiny_config("peer"), QUERY_NORM | POOL),
    "peer_rms": (tiny_config("peer", query_norm="rms"), POOL),
    "peer_no_norm": (tiny_config("peer", query_norm=None), POOL),
    "own_keys": (tiny_config("peer", sub_keys_per_head=True), QUERY_NORM | POOL),
    "gated": (tiny_config("peer", gated_experts=True), QUERY_NORM | POOL | GATE),
    "branch": (tiny_config("peer", shared_expert_intermediate_size=8), QUERY_NORM | POOL | BRANCH),
    "one_pool": (tiny_config("peer", "peer", share_experts_across_layers=True), QUERY_NORM | SHARED_POOL),
    "one_pool_of_none": (tiny_config("dense", share_experts_across_layers=True), DENSE),
    "grown_open": (tiny_config("peer", expert_additions=[OPEN]), QUERY_NORM | POOL),
    "grown": (
        tiny_config("peer", "dense", expert_additions=[{"layers": [0], **PROTECTED}]),
        QUERY_NORM | ADDED_QUERY_NORM | POOL | ADDED_POOL | DENSE,
    ),
    "grown_gated": (
        tiny_config("peer", query_norm=None, gated_experts=True, expert_additions=[{"layers": [0], **PROTECTED}]),
        POOL | GATE | ADDED_POOL | ADDED_GATE,
    ),
    "grown_one_pool": (
        tiny_config(
            "peer",
            "peer",
            share_experts_across_layers=True,
            gated_experts=True,
            shared_expert_intermediate_size=8,
            expert_additions=[{"layers": [0, 1], **PROTECTED}],
        ),
        QUERY_NORM | ADDED_QUERY_NORM | SHARED_POOL | SHARED_GATE | ADDED_SHARED_POOL | ADDED_SHARED_GATE | BRANCH,
    ),
    "all_in_one": (tiny_config("peer", "moe", "pkm", "dense"), QUERY_NORM | POOL | MOE | VALUES | DENSE),
    "tied_embeddings": (tiny_config("peer", tie_word_embeddings=True), QUERY_NORM | POOL),
}


def on_meta(config: PeerConfig, model_class: type = PeerForCausalLM) -> PeerForCausalLM:
    with torch.device("meta"):
        return model_class(config)


def embeddings(config: PeerConfig) -> dict[str, str]:
    """Transformers adds them to a plan that does not have them, before 5.21 where they are tied alone."""
    added = is_at_least("Transformers", "5.21") or config.tie_word_embeddings
    return {"embed_tokens": "embedding_rowwise"} if added else {}


@pytest.mark.parametrize(("config", "feed_forwards"), PLANS.values(), ids=PLANS)
def test_the_tensor_parallel_plan(config, feed_forwards):
    before = config.to_dict(), dict(config.base_model_tp_plan)
    plan = ATTENTION | feed_forwards | embeddings(config)
    model = on_meta(config)
    assert model.model.tp_plan == plan
    inside = {f"model.{name}": style for name, style in plan.items()}
    assert model.tp_plan == inside | {"lm_head": "colwise_gather_output"}
    assert on_meta(config, PeerForSequenceClassification).tp_plan == inside
    assert (config.to_dict(), config.base_model_tp_plan) == before


POOL_EXCHANGE = {
    "expert_pool": "expert_pool_exchange",
    "expert_pool.up_proj": "expert_columns",
    "expert_pool.down_proj": "expert_columns",
}
ADDED_EXCHANGE = {
    "expert_pool.added.*": "expert_pool_exchange",
    "expert_pool.added.*.up_proj": "expert_columns",
    "expert_pool.added.*.down_proj": "expert_columns",
}
GATE_EXCHANGE = {"expert_pool.gate_proj": "expert_columns"}
ADDED_GATE_EXCHANGE = {"expert_pool.added.*.gate_proj": "expert_columns"}


def in_layers(plan: dict[str, str]) -> dict[str, str]:
    return {f"layers.*.mlp.{name}": style for name, style in plan.items()}


EXPERT_PLANS = {
    "dense": {},
    "moe": {},
    "pkm": in_layers({"values": "expert_values_exchange"}),
    "peer": in_layers(POOL_EXCHANGE),
    "gated": in_layers(POOL_EXCHANGE | GATE_EXCHANGE),
    "branch": in_layers(POOL_EXCHANGE),
    "one_pool": POOL_EXCHANGE,
    "one_pool_of_none": {},
    "grown_open": in_layers(POOL_EXCHANGE),
    "grown": in_layers(POOL_EXCHANGE | ADDED_EXCHANGE),
    "grown_one_pool": POOL_EXCHANGE | GATE_EXCHANGE | ADDED_EXCHANGE | ADDED_GATE_EXCHANGE,
    "all_in_one": in_layers(POOL_EXCHANGE | {"values": "expert_values_exchange"}),
}


@pytest.mark.skipif(not is_at_least("Transformers", "5.24"), reason="Memory groups need Transformers 5.24.")
@pytest.mark.parametrize(("name", "plan"), EXPERT_PLANS.items(), ids=EXPERT_PLANS)
def test_the_plan_of_a_memory_group(name, plan):
    config, _ = PLANS[name]
    model = on_meta(config)
    assert model.model.ep_plan == plan
    inside = {f"model.{module}": style for module, style in plan.items()}
    assert model.ep_plan == on_meta(config, PeerForSequenceClassification).ep_plan == inside


def test_the_pipeline_parallel_plan():
    assert on_meta(tiny_config("peer", "dense")).pp_plan == {
        "model.embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "model.layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "model.norm": (["hidden_states"], ["hidden_states"]),
        "lm_head": (["hidden_states"], ["logits"]),
    }


def test_a_plan_set_on_a_configuration_is_of_its_models_alone():
    config = tiny_config("peer")
    config.base_model_tp_plan = {**config.base_model_tp_plan, "layers.*.mlp.expert_pool.up_proj": "replicate"}
    plan = on_meta(config).model.tp_plan
    assert plan["layers.*.mlp.expert_pool.up_proj"] == "replicate"
    assert plan["layers.*.mlp.expert_pool.down_proj"] == "expert_down_projection"
    assert on_meta(tiny_config("peer")).model.tp_plan["layers.*.mlp.expert_pool.up_proj"] == "expert_up_projection"


def test_a_registered_variant_without_a_plan(monkeypatch):
    monkeypatch.setitem(FeedForwardInterface._global_mapping, "plain", lambda config, layer_idx: nn.Identity())
    config = tiny_config("plain")
    assert on_meta(config).model.tp_plan == ATTENTION | embeddings(config)


def test_tensor_parallelism_of_experts_needs_a_later_release(monkeypatch):
    table = on_meta(tiny_config("peer")).model.layers[0].mlp.expert_pool.up_proj
    style = ALL_PARALLEL_STYLES["expert_up_projection"]
    monkeypatch.setitem(FOUND_RELEASES, "Transformers", "5.23.0")
    style.validate_param(table, "weight", None)
    monkeypatch.setitem(FOUND_RELEASES, "Transformers", "5.22.2")
    with pytest.raises(
        RuntimeError, match=r"Tensor parallelism of experts needs Transformers 5\.23 or later, found 5\.22"
    ):
        style.validate_param(table, "weight", None)


def test_a_memory_group_needs_a_later_release(monkeypatch):
    pool = on_meta(tiny_config("peer")).model.layers[0].mlp.expert_pool
    style = ALL_PARALLEL_STYLES["expert_columns"]
    monkeypatch.setitem(FOUND_RELEASES, "Transformers", "5.23.1")
    message = r"A memory group \(`ep_size` of a PEER model\) needs Transformers 5\.24 or later, found 5\.23\.1"
    with pytest.raises(RuntimeError, match=message):
        style.validate_param(pool.up_proj, "weight", None)
    with pytest.raises(RuntimeError, match=message):
        shard_experts(on_meta(tiny_config("peer")), 2)
    with pytest.raises(RuntimeError, match=message):
        PeerForCausalLM.prepare_distribute_model({"fsdp_size": 2, "ep_size": 2})


def test_an_activation_with_parameters_is_refused():
    pool = on_meta(tiny_config("peer")).model.layers[0].mlp.expert_pool
    pool.act_fn, pool.act_has_parameters = nn.PReLU(), True
    with pytest.raises(ValueError, match="must have no parameters, got PReLU"):
        ALL_PARALLEL_STYLES["expert_pool_exchange"].install_forward(pool, None)


def test_an_adapter_in_the_place_of_a_table_is_refused():
    pool = on_meta(tiny_config("peer")).model.layers[0].mlp.expert_pool
    ALL_PARALLEL_STYLES["expert_pool_exchange"].install_forward(pool, mock.Mock())
    pool.up_proj = nn.Sequential(pool.up_proj)
    with pytest.raises(TypeError, match="found Sequential in the place of one: adapters on tables do not work"):
        pool(None, None, None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_no_plan_is_saved(tied, tmp_path):
    config = tiny_config("peer", "moe", tie_word_embeddings=tied)
    for name in ("tp", "pp", "ep"):
        plan = getattr(config, f"base_model_{name}_plan") or {"layers.*.mlp.experts": "ep_dispatch_experts"}
        setattr(config, f"base_model_{name}_plan", plan)
    config.save_pretrained(tmp_path / "config")
    PeerForCausalLM(config).save_pretrained(tmp_path / "model")
    for folder in ("config", "model"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert not [name for name in saved if "plan" in name]
    assert not [name for name in config.to_dict() if "plan" in name]
