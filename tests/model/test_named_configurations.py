# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The named configurations load, say only what they mean, and are found in a checkout and in a wheel."""

import json
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM, configuration_path, list_configurations, model_costs
from studies.common.training_plan import Run, configuration_of
from studies.recipe.plan import RECIPE, read_plan


CHECKOUT = Path(__file__).parents[2]
RECIPE_SIZES = ("nano", "toy", "laptop", "gpu")
NAMES = sorted(
    [
        *(f"{each}-{size}" for each in ("dense", "peer") for size in RECIPE_SIZES),
        *(f"{each}-{size}" for each in ("dense", "moe", "peer", "pkm") for size in ("paper", "tiny")),
    ]
)


def test_listed():
    assert list_configurations() == NAMES


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="peer-huge"):
        configuration_path("peer-huge")


@pytest.mark.parametrize("name", NAMES)
class TestFile:
    def test_loads_with_the_variant_in_its_blocks(self, name):
        config = AutoConfig.from_pretrained(configuration_path(name))
        assert type(config) is PeerConfig and config.architectures == ["PeerForCausalLM"]
        variant, size = name.split("-")
        last = config.num_hidden_layers - 1
        blocks = range(last + 1) if size in RECIPE_SIZES else (last // 2,)
        expected = [variant if block in blocks else "dense" for block in range(last + 1)]
        assert config.feed_forward_types == expected

    def test_has_no_field_that_the_configuration_has_not(self, name):
        written = json.loads((Path(configuration_path(name)) / "config.json").read_text())
        assert written.pop("model_type") == "peer"
        assert set(written) <= {field.name for field in fields(PeerConfig)} - {"transformers_version"}
        loaded = PeerConfig.from_pretrained(configuration_path(name))
        assert {field: getattr(loaded, field) for field in written} == written


@pytest.mark.parametrize("name", NAMES)
def test_builds(name):
    """With as many parameters as are counted of it; the large ones without memory for them."""
    config = AutoConfig.from_pretrained(configuration_path(name))
    with torch.device("meta" if name.endswith(("-paper", "-gpu", "-laptop")) else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model) is PeerForCausalLM
    assert model.num_parameters() == model_costs(config).parameters


def test_paper_sizes():
    """Set-up of the paper's section 3.1; a PKM head takes twice as many, of which each costs half."""
    peer, pkm, moe = (AutoConfig.from_pretrained(configuration_path(f"{v}-paper")) for v in ("peer", "pkm", "moe"))
    for config, k in ((peer, 16), (pkm, 32)):
        retrieval = config.num_experts, config.num_retrieval_heads, config.num_experts_per_head, config.query_norm
        assert retrieval == (1024**2, 8, k, "batch")
    assert moe.moe_num_experts == 128
    assert moe.output_router_logits  # without them the balance loss is none


@pytest.mark.parametrize("size", RECIPE_SIZES)
def test_twins_of_the_recipe(size):
    """PEER has the settings of the study, and its twin the same width and no fewer FLOPs per token."""
    peer, dense = (
        PeerConfig.from_pretrained(configuration_path(f"{variant}-{size}")) for variant in ("peer", "dense")
    )
    plan = read_plan(CHECKOUT / "examples" / "studies" / "recipe" / "plans" / "two-cores.json")
    studied = configuration_of(Run(RECIPE, peer.hidden_size, 1, 0.004), plan)
    for name in ("query_size", "num_retrieval_heads", "num_experts_per_head", "sub_keys_per_head", "query_norm"):
        assert getattr(peer, name) == getattr(studied, name), name
    assert peer.expert_initializer_range == studied.expert_initializer_range
    assert peer.hidden_size == dense.hidden_size
    assert model_costs(peer).flops < model_costs(dense).flops


def test_found_in_a_wheel(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", str(CHECKOUT), "--no-deps", "--no-build-isolation", "-w", "."]
    subprocess.run(build, cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    assert not [*tmp_path.rglob("*.safetensors")]  # the checkpoints of the repository stay there
    program = (
        "import modeling_peer\n"
        "from transformers import AutoConfig\n"
        "from modeling_peer import configuration_path, list_configurations\n"
        "print(modeling_peer.__file__, *list_configurations())\n"
        "AutoConfig.from_pretrained(configuration_path('peer-tiny'))\n"
    )
    # Isolated (-I): without the current folder or PYTHONPATH, where the checkout may be.
    program = f"import sys; sys.path.insert(0, 'installed')\n{program}"
    output = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    imported_from, *names = output.stdout.split()
    assert (tmp_path / imported_from).is_relative_to(tmp_path / "installed")
    assert names == NAMES
