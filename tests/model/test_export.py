# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Models leave Python in torch's own operations, whatever kernels they run on here, and compute the same elsewhere: in a
program of `torch.export`, in ONNX Runtime and in ExecuTorch.
"""

import pytest
import torch
from tiny_models import random_tokens, tiny_config, tiny_model
from torch import nn


CONFIGS = {
    "peer": tiny_config("dense", "peer"),
    "pkm": tiny_config("pkm", "dense"),
    "options": tiny_config(
        "peer", "peer", query_norm="rms", gated_experts=True, share_experts_across_layers=True, sub_keys_per_head=True
    ),
}

LENGTHS = ({0: torch.export.Dim("batch_size", min=1, max=8), 1: torch.export.Dim("length", min=2, max=64)},)


class Logits(nn.Module):
    """From token ids alone, as exported programs take them."""

    def __init__(self, config):
        super().__init__()
        self.model = tiny_model(config)

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(params=CONFIGS)
def module(request):
    return Logits(CONFIGS[request.param])


@torch.no_grad()
def test_programs_have_no_operators_of_the_package(module):
    program = torch.export.export(module, (random_tokens(2, 5),), dynamic_shapes=LENGTHS)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {each.namespace for each in targets if isinstance(each, torch._ops.OpOverload)} == {"aten"}
    for shape in ((2, 5), (3, 11)):
        tokens = random_tokens(*shape, seed=2)
        torch.testing.assert_close(program.module()(tokens), module(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_onnx(module, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="what exports to ONNX and runs it is in no extra")
    import onnxruntime

    file = tmp_path / "model.onnx"
    torch.onnx.export(
        module, (random_tokens(2, 5),), file, dynamo=True, input_names=["input_ids"], dynamic_shapes=LENGTHS
    )
    session = onnxruntime.InferenceSession(file)
    for shape in ((2, 5), (3, 11)):
        tokens = random_tokens(*shape, seed=2)
        (logits,) = session.run(None, {"input_ids": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), module(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_executorch(module):
    pytest.importorskip("executorch", reason="ExecuTorch is in no extra")
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    tokens = random_tokens(1, 9)
    program = torch.export.export(module, (tokens,))
    lowered = to_edge_transform_and_lower(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    method = Runtime.get().load_program(lowered.to_executorch().buffer).load_method("forward")
    torch.testing.assert_close(method.execute([tokens])[0], module(tokens), rtol=1e-4, atol=1e-5)
