# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A PEER-pytorch layer computes the same function after its conversion, or the conversion is refused with a reason."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from convert_peer_pytorch import layer_fields, place_layer
from PEER_pytorch import PEER
from preloaded import python
from tiny_models import tiny_config, tiny_model
from torch import nn
from torch.testing import assert_close

from common.command_line import UsageError
from modeling_peer import PeerForCausalLM, quantize_experts


ROOT = Path(__file__).parents[2]

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


def assert_equal_outputs(layer, peer):
    x = torch.randn(2, 50, DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(layer(x), peer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"non_competing_scores": False, "activation": nn.ReLU}, {"activation": "relu"}),
        ({"non_competing_scores": False, "product_key_topk": 6}, {"product_key_topk": 6}),
        ({"non_competing_scores": False, "num_experts_per_head": 7, "dropout": 0.1}, {"num_experts_per_head": 7}),
        ({"non_competing_scores": True}, {}),
        ({"non_competing_scores": True, "dim_key": None, "product_key_topk": 2}, {"product_key_topk": 2}),
    ],
)
@pytest.mark.parametrize("feed_forward", ["dense", "peer"])
def test_equal_outputs_and_all_else_stays(options, flags, feed_forward):
    peer = peer_pytorch_layer(**options)
    flags = {"num_experts_per_head": 4, "non_competing_scores": options["non_competing_scores"], **flags}
    fields = layer_fields(peer.state_dict(), **flags)
    before = host("dense", feed_forward, "moe", tie_word_embeddings=True)
    model = place_layer(before, 1, peer.state_dict(), fields)
    assert_equal_outputs(model.model.layers[1].mlp, peer)
    assert model.config.feed_forward_types == ["dense", "peer", "moe"]
    others = {name: tensor for name, tensor in before.state_dict().items() if ".1.mlp." not in name}
    assert_close({name: model.state_dict()[name] for name in others}, others, rtol=0, atol=0)


def test_pre_norm_becomes_the_norm_of_the_decoder_layer():
    peer = peer_pytorch_layer(pre_rmsnorm=True, non_competing_scores=False)
    fields = layer_fields(peer.state_dict(), num_experts_per_head=4, non_competing_scores=False)
    layer = place_layer(host("dense", "dense"), 0, peer.state_dict(), fields).model.layers[0]
    assert_equal_outputs(lambda x: layer.mlp(layer.post_attention_layernorm(x)), peer)


@pytest.mark.parametrize(
    ("types", "options", "flags"),
    [
        (["dense"], {"separate_embed_per_head": True}, {}),
        (["dense"], {"dim": 32}, {}),
        (["dense", "peer"], {}, {}),  # whose pool has another number of experts
        (["dense"], {}, {"activation": "no_such"}),
        (["dense"], {}, {"num_experts_per_head": 8, "non_competing_scores": False}),
        # A retrieval that is not exact.
        (["dense"], {}, {"num_experts_per_head": 4, "product_key_topk": 2, "non_competing_scores": False}),
    ],
)
def test_layers_that_do_not_fit(types, options, flags):
    peer = peer_pytorch_layer(**options)
    with pytest.raises(UsageError):
        place_layer(host(*types), 0, peer.state_dict(), layer_fields(peer.state_dict(), **flags))


def test_a_quantized_checkpoint_is_refused():
    peer = peer_pytorch_layer()
    with pytest.raises(UsageError, match="quantized"):
        place_layer(quantize_experts(host("peer")), 0, peer.state_dict(), layer_fields(peer.state_dict()))


def test_script(tmp_path):
    peer = peer_pytorch_layer(non_competing_scores=False)
    tensors = {f"blocks.5.ff.{name}": tensor for name, tensor in peer.state_dict().items()}
    tensors["blocks.4.ff.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "layer.pt")
    host("dense", "dense").save_pretrained(tmp_path / "host")
    subprocess.run(
        [
            *(python(), ROOT / "examples/convert_peer_pytorch.py"),
            *("--peer_pytorch_checkpoint", tmp_path / "layer.pt", "--prefix", "blocks.5.ff."),
            *("--model_name_or_path", tmp_path / "host", "--layer", "1", "--output_dir", tmp_path / "converted"),
            *("--num_experts_per_head", "4", "--non_competing_scores", "False"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    model = PeerForCausalLM.from_pretrained(tmp_path / "converted")
    assert_equal_outputs(model.model.layers[1].mlp, peer)
