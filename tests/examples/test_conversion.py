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
"""A PEER-pytorch layer computes the same function after its conversion, or the conversion is refused with a reason."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from convert_peer_pytorch import _load_state_dict, layer_fields, place_layer
from PEER_pytorch import PEER, PEERLora
from preloaded import python
from tiny_models import tiny_config, tiny_model
from torch import nn
from torch.testing import assert_close

from common.command_line import UsageError
from modeling_peer import PeerForCausalLM


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


DIM = 24
SIZES = {"dim": DIM, "heads": 3, "num_experts": 7**2, "num_experts_per_head": 4, "dim_key": 6}


def peer_pytorch_layer(**options) -> PEER:
    """A layer whose scores differ from each other and whose norm is not the one it starts with."""
    torch.manual_seed(0)
    layer = PEER(**{**SIZES, **options})
    with torch.no_grad():
        layer.keys.normal_()
        layer.weight_up_embed.weight.mul_(0.3)
        if options.get("pre_rmsnorm"):
            layer.norm.gamma.normal_(std=0.5)
    return layer.eval()


def host(*feed_forward_types, **fields) -> PeerForCausalLM:
    """A model to put a layer into; the eps of its norms is next to the none of PEER-pytorch."""
    return tiny_model(tiny_config(*feed_forward_types, rms_norm_eps=1e-12, **fields))


def hidden_states():
    return torch.randn(2, 50, DIM, generator=torch.Generator().manual_seed(1))


def assert_equal_outputs(layer, peer, x):
    with torch.no_grad():
        assert_close(layer(x), peer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"non_competing_scores": False}, {}),
        ({"non_competing_scores": False, "activation": nn.ReLU}, {"activation": "relu"}),
        ({"non_competing_scores": False, "product_key_topk": 6}, {"product_key_topk": 6}),
        ({"non_competing_scores": False, "num_experts_per_head": 7, "dropout": 0.1}, {"num_experts_per_head": 7}),
        ({"non_competing_scores": True}, {}),
        ({"non_competing_scores": True, "dim_key": None, "product_key_topk": 2}, {"product_key_topk": 2}),
    ],
)
@pytest.mark.parametrize("feed_forward", ["dense", "peer"])
def test_equal_outputs(options, flags, feed_forward):
    peer = peer_pytorch_layer(**options)
    flags = {"num_experts_per_head": 4, "non_competing_scores": options["non_competing_scores"], **flags}
    fields = layer_fields(peer.state_dict(), **flags)
    model = place_layer(host("dense", feed_forward), 1, peer.state_dict(), fields)
    assert_equal_outputs(model.model.layers[1].mlp, peer, hidden_states())


def test_pre_norm_becomes_the_norm_of_the_decoder_layer():
    peer = peer_pytorch_layer(pre_rmsnorm=True, non_competing_scores=False)
    fields = layer_fields(peer.state_dict(), num_experts_per_head=4, non_competing_scores=False)
    layer = place_layer(host("dense", "dense"), 0, peer.state_dict(), fields).model.layers[0]
    assert_equal_outputs(lambda x: layer.mlp(layer.post_attention_layernorm(x)), peer, hidden_states())


def test_all_else_stays():
    peer = peer_pytorch_layer()
    before = host("dense", "moe", "dense", tie_word_embeddings=True)
    model = place_layer(before, 2, peer.state_dict(), layer_fields(peer.state_dict()))
    assert model.config.feed_forward_types == ["dense", "moe", "peer"]
    others = {name: tensor for name, tensor in before.state_dict().items() if ".2.mlp." not in name}
    assert_close({name: model.state_dict()[name] for name in others}, others, rtol=0, atol=0)


def test_several_layers_one_after_the_other():
    peers = [peer_pytorch_layer(), peer_pytorch_layer()]
    nn.init.normal_(peers[1].weight_up_embed.weight)
    model = host("dense", "dense")
    for i, peer in enumerate(peers):
        model = place_layer(model, i, peer.state_dict(), layer_fields(peer.state_dict()))
    for i, peer in enumerate(peers):
        assert_equal_outputs(model.model.layers[i].mlp, peer, hidden_states())


class TestRefusals:
    def test_separate_experts_of_heads(self):
        layer = peer_pytorch_layer(separate_embed_per_head=True)
        with pytest.raises(UsageError, match="separate_embed_per_head"):
            layer_fields(layer.state_dict())

    def test_inexact_retrieval(self):
        layer = peer_pytorch_layer(non_competing_scores=False, product_key_topk=2)
        with pytest.raises(UsageError, match="product_key_topk=2"):
            layer_fields(layer.state_dict(), num_experts_per_head=4, product_key_topk=2, non_competing_scores=False)

    def test_other_layers(self):
        with pytest.raises(UsageError, match="PEERLora"):
            layer_fields(PEERLora(DIM, num_experts=7**2).state_dict())

    def test_no_file(self):
        with pytest.raises(UsageError, match=r"no file none.pt: .* --peer_pytorch_checkpoint"):
            _load_state_dict("none.pt", "")

    @pytest.mark.parametrize(
        ("types", "options", "layer", "message"),
        [
            (["dense"], {}, 1, "no layer 1"),
            (["dense"], {"dim": 32}, 0, "dim=32"),
            (["dense", "peer"], {}, 0, "num_experts = 36, not 49"),
            (["dense"], {"activation_name": "no_such"}, 0, "expert_act"),
            (["dense"], {"num_experts_per_head": 8}, 0, "num_experts_per_head"),
        ],
    )
    def test_layers_that_do_not_fit(self, types, options, layer, message):
        flags = {"activation": options.pop("activation_name", "gelu")}
        if "num_experts_per_head" in options:
            flags |= {"num_experts_per_head": options["num_experts_per_head"], "non_competing_scores": False}
        peer = peer_pytorch_layer(**options)
        with pytest.raises(UsageError, match=message):
            place_layer(host(*types), layer, peer.state_dict(), layer_fields(peer.state_dict(), **flags))


def test_script(tmp_path):
    peer = peer_pytorch_layer(non_competing_scores=False)
    tensors = {f"blocks.5.ff.{name}": tensor for name, tensor in peer.state_dict().items()}
    tensors["blocks.4.ff.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "layer.pt")
    host("dense", "dense").save_pretrained(tmp_path / "host")
    subprocess.run(
        [
            *(python(), EXAMPLES / "convert_peer_pytorch.py"),
            *("--peer_pytorch_checkpoint", tmp_path / "layer.pt", "--prefix", "blocks.5.ff."),
            *("--model_name_or_path", tmp_path / "host", "--layer", "1", "--output_dir", tmp_path / "converted"),
            *("--num_experts_per_head", "4", "--non_competing_scores", "False"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    model = PeerForCausalLM.from_pretrained(tmp_path / "converted")
    assert_equal_outputs(model.model.layers[1].mlp, peer, hidden_states())
