# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A PEER model for vLLM: vLLM's Llama with the feed-forwards and kernels of this package. Attention, its paged cache,
batches, sampling and dense feed-forwards are vLLM's own.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from ..configuration_peer import generations_of
from ..experts import ExpertPool, expert_tables
from ..feed_forward import ALL_FEED_FORWARDS
from ..quantization.quantizer import PeerQuantizationConfig
from ..quantization.table import make_quantized, tables_to_quantize


class QuantizedTablesConfig(QuantizationConfig):
    """Quantization of expert tables in 8 or 4 bits. Modules of vLLM itself are not quantized."""

    def __init__(self, bits: int, group_size: int | None):
        super().__init__()
        self.tables = PeerQuantizationConfig(bits, group_size)

    def get_name(self) -> str:
        return self.tables.quant_method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizedTablesConfig":
        return cls(config["bits"], config["group_size"])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class PeerDecoderLayer(LlamaDecoderLayer):
    """A layer of Llama, whose feed-forward is the one that the configuration names."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        config = config or vllm_config.model_config.hf_config
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)
        layer_idx = extract_layer_index(prefix)
        if (kind := config.feed_forward_types[layer_idx]) != "dense":
            self.mlp = ALL_FEED_FORWARDS[kind](config, layer_idx)


class PeerModel(LlamaModel):
    """The decoder. It stacks projections as Llama does, by names with `.mlp`: tables too are called `up_proj`."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = PeerDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        if self.config.share_experts_across_layers:
            self.expert_pool = ExpertPool(self.config, generations_of(self.config))
            for index in range(self.start_layer, self.end_layer):
                if self.config.feed_forward_types[index] == "peer":
                    feed_forward = self.layers[index].mlp
                    feed_forward.forward = _with_pool(feed_forward, self.expert_pool)
        quantization = vllm_config.quant_config
        if isinstance(quantization, QuantizedTablesConfig) and expert_tables(self):
            for name, table in tables_to_quantize(self).items():
                device = table.weight.device
                quantized = make_quantized(table, quantization.tables.bits, quantization.tables.group_size)
                self.set_submodule(name, quantized.to_empty(device=device))


def _with_pool(feed_forward, pool):
    """Make the forward of a PEER layer with the pool of the model, which is not a module of the layer."""

    def forward(hidden_states):
        return type(feed_forward).forward(feed_forward, hidden_states, expert_pool=pool)

    return forward


class PeerForCausalLM(LlamaForCausalLM):
    """[`~modeling_peer.PeerForCausalLM`] for vLLM."""

    hf_to_vllm_mapper = PeerModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = PeerDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = PeerDecoderLayer):
        return PeerModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
