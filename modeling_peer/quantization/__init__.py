# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Expert tables in integers of 8 or 4 bits, as a quantizer of Transformers, which importing this folder registers."""

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from .quantizer import QUANT_METHOD, PeerHfQuantizer, PeerQuantizationConfig


register_quantization_config(QUANT_METHOD)(PeerQuantizationConfig)
register_quantizer(QUANT_METHOD)(PeerHfQuantizer)
