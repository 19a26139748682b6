# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The plans by which Transformers splits models: of every variant, exactly the modules that there are."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROTECTED, tiny_config
from torch import nn

from modeling_peer import FeedForwardInterface, PeerConfig, PeerForCausalLM, PeerForSequenceClassification
from modeling_peer.parallel import columns, releases
from modeling_peer.parallel.releases import PARALLEL_STYLES


pytestmark = pytest.mark.skipif(
    not releases.HAS_PARALLEL_STYLES, reason="expert tables are split with Transformers 5.24 or later"
)

OTHERS = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
DENSE = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
MOE = {
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}


def dense(prefix: str) -> dict[str, str]:
    return {f"{prefix}.{name}": style for name, style in DENSE.items()}


def tables(prefix: str, *names: str) -> dict[str, str]:
    return {f"{prefix}.{name}": "expert_columns" for name in names or ("up_proj", "down_proj")}


POOL, GATE, VALUES = "layers.*.mlp.expert_pool", "gate_proj", tables("layers.*.mlp", "values")
ADDITION = [{"layers": [0], **PROTECTED}]
# Of each case: the plan of tables, and that of other modules of feed-forwards.
PLANS = {
    "dense": (tiny_config("dense"), {}, dense("layers.*.mlp")),
    "moe": (tiny_config("moe"), {}, MOE),
    "pkm": (tiny_config("pkm"), VALUES, {}),
    "peer": (tiny_config("peer"), tables(POOL), {}),
    "rms": (tiny_config("peer", query_norm="rms", sub_keys_per_head=True), tables(POOL), {}),
    "gated": (tiny_config("peer", gated_experts=True), tables(POOL) | tables(POOL, GATE), {}),
    "branch": (
        tiny_config("peer", shared_expert_intermediate_size=8),
        tables(POOL),
        dense("layers.*.mlp.shared_expert"),
    ),
    "one_pool": (tiny_config("peer", "peer", share_experts_across_layers=True), tables("expert_pool"), {}),
    "grown": (
        tiny_config("peer", "dense", expert_additions=ADDITION),
        tables(POOL) | tables(f"{POOL}.added.*"),
        dense("layers.*.mlp"),
    ),
    "all_in_one": (
        tiny_config("peer", "moe", "pkm", "dense"),
        tables(POOL) | VALUES,
        MOE | dense("layers.*.mlp"),
    ),
}


def on_meta(config: PeerConfig, model_class: type = PeerForCausalLM) -> PeerForCausalLM:
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.parametrize(("config", "of_tables", "others"), PLANS.values(), ids=PLANS)
def test_the_plans(config, of_tables, others):
    before = config.to_dict()
    model = on_meta(config)
    plan = OTHERS | of_tables | others
    assert model.model.tp_plan == plan
    assert model.model.ep_plan == of_tables
    inside = {f"model.{name}": style for name, style in plan.items()}
    assert model.tp_plan == inside | {"lm_head": "colwise_gather_output"}
    assert on_meta(config, PeerForSequenceClassification).tp_plan == inside
    assert model.ep_plan == {f"model.{name}": style for name, style in of_tables.items()}
    assert config.to_dict() == before and not [name for name in before if "plan" in name]


def test_a_plan_set_on_a_configuration_goes_first_and_is_of_its_models_alone():
    config = tiny_config("peer")
    config.base_model_tp_plan = {**config.base_model_tp_plan, f"{POOL}.up_proj": "replicate"}
    plan = on_meta(config).model.tp_plan
    assert (plan[f"{POOL}.up_proj"], plan[f"{POOL}.down_proj"]) == ("replicate", "expert_columns")
    assert on_meta(tiny_config("peer")).model.tp_plan[f"{POOL}.up_proj"] == "expert_columns"


def test_a_registered_variant_without_a_plan(monkeypatch):
    monkeypatch.setitem(FeedForwardInterface._global_mapping, "plain", lambda config, layer_idx: nn.Identity())
    assert on_meta(tiny_config("plain")).model.tp_plan == OTHERS


def test_every_process_has_columns(monkeypatch):
    """Of a table of 24 columns, parts of 6 and 5, but the last of seven has none. Earlier releases split nothing."""
    table = on_meta(tiny_config("peer")).model.layers[0].mlp.expert_pool.up_proj

    def validate(size):
        mesh = SimpleNamespace(size=lambda: size)
        PARALLEL_STYLES["expert_columns"].validate_param(table, "weight", mesh, "up_proj.weight")

    validate(4)
    validate(5)
    with pytest.raises(ValueError, match="up_proj"):
        validate(7)
    monkeypatch.setattr(releases, "HAS_PARALLEL_STYLES", False)
    with pytest.raises(RuntimeError, match=r"5\.24"):
        validate(4)


def test_what_is_no_plain_table_is_not_split():
    model = on_meta(tiny_config("peer"))
    model.model.layers[0].mlp.expert_pool.up_proj = nn.Sequential(model.model.layers[0].mlp.expert_pool.up_proj)
    with pytest.raises(ValueError, match="up_proj"):
        columns.run_on_columns(model, columns.MemoryGroup(None, None))
