# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The plugin that vLLM loads in each of its processes if this package is installed (`vllm.general_plugins`). PEER models
run with a class of their own, in `vllm_peer.py`, and merged grafts with the Transformers backend. None needs
`--trust-remote-code`.
"""

import warnings

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..graft_merged import CLASS_PREFIX
from ..quantization.quantizer import QUANT_METHOD


TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register PEER models, merged grafts and quantized tables with vLLM."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .vllm_peer import QuantizedTablesConfig
    except Exception as error:  # it would end vLLM, whichever model it should run
        warnings.warn(f"PEER models do not run by this release of vLLM: {error}", stacklevel=2)
        return
    ModelRegistry.register_model("PeerForCausalLM", f"{__package__}.vllm_peer:PeerForCausalLM")
    for base_model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        ModelRegistry.register_model(f"{CLASS_PREFIX}{base_model}", TRANSFORMERS_BACKEND)
    register_quantization_config(QUANT_METHOD)(QuantizedTablesConfig)
