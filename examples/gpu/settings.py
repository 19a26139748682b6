# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the parts run on, and how large it is."""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """
    Device, kernels, folder and sizes of a run. The defaults are the sizes for a GPU; [`tiny_sizes`] has those for a
    test. Widths are hidden sizes, and sizes of what is checked are tokens, active experts and experts.
    """

    device: str
    kernels: str
    output_dir: str
    seed: int
    tiny: bool = False

    # equality
    checked: dict[str, list] = field(
        default_factory=lambda: {
            "sizes": [[1, 128, 4096], [33, 24, 300], [256, 64, 2048]],
            "widths": [64, 65, 512, 1001, 2048, 4096],
        }
    )
    # From 512 tokens on `down` runs otherwise.
    production: dict[str, list] = field(
        default_factory=lambda: {"sizes": [[1024, 128, 2**16], [4096, 128, 2**18]], "widths": [1024, 2048]}
    )
    # Tokens, heads, √N, d_k / 2, k and sets of sub-keys. More than 512 tokens of production sizes run in pieces.
    retrievals: list[list[int]] = field(
        default_factory=lambda: [
            [1, 8, 1024, 128, 16, 1],
            [1300, 8, 1024, 128, 16, 1],
            [1300, 8, 1024, 128, 16, 8],
            [65, 3, 33, 20, 5, 3],
            [512, 4, 256, 64, 1, 1],
        ]
    )
    small_layer: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 256,
            "num_experts": 64**2,
            "num_retrieval_heads": 4,
            "num_experts_per_head": 8,
            "query_size": 64,
        }
    )
    small_tokens: int = 512

    # kernels, tuning, layer, decode
    layer_widths: list[int] = field(default_factory=lambda: [1024, 2048])
    grid_size: int = 1024
    num_heads: int = 8
    num_experts_per_head: int = 16
    query_size: int = 256
    kernel_tokens: int = 4096
    layer_tokens: int = 16384
    dtype: str = "bfloat16"
    repetitions: int = 20
    decoded_models: list[str] = field(default_factory=lambda: ["peer-paper", "dense-paper"])
    decoded_tokens: int = 64

    # training
    training_seconds: float = 120.0
    training_model: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 8192,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_experts": 512**2,
            "num_retrieval_heads": 8,
            "num_experts_per_head": 16,
            "query_size": 128,
            "max_position_embeddings": 512,
        }
    )
    peer_layers: list[int] = field(default_factory=lambda: [2, 5])
    batch_size: int = 32
    learning_rate: float = 1e-3
    text_characters: int = 50_000_000

    @property
    def num_experts(self) -> int:
        """N of the layers that are timed."""
        return self.grid_size**2

    @property
    def num_active(self) -> int:
        """Active experts per token of the layers that are timed."""
        return self.num_heads * self.num_experts_per_head

    def sizes(self) -> dict[str, Any]:
        """All of it but the folder and the seed, which results do not depend on."""
        return {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("output_dir", "seed")
        }


def tiny_sizes() -> dict[str, Any]:
    """Sizes at which every part runs on a CPU in seconds."""
    return {
        "tiny": True,
        "checked": {"sizes": [[1, 3, 9], [6, 4, 16]], "widths": [8, 17]},
        "production": {"sizes": [[32, 4, 16]], "widths": [8]},
        "retrievals": [[1, 2, 8, 4, 3, 1], [5, 2, 16, 8, 4, 2]],
        "small_layer": {
            "hidden_size": 16,
            "num_experts": 64,
            "num_retrieval_heads": 2,
            "num_experts_per_head": 4,
            "query_size": 8,
        },
        "small_tokens": 32,
        "layer_widths": [16],
        "grid_size": 16,
        "num_heads": 2,
        "num_experts_per_head": 4,
        "query_size": 8,
        "kernel_tokens": 16,
        "layer_tokens": 16,
        "dtype": "float32",
        "repetitions": 2,
        "decoded_models": ["peer-tiny", "dense-tiny"],
        "decoded_tokens": 2,
        "training_seconds": 0.5,
        "training_model": {
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_experts": 64,
            "num_retrieval_heads": 2,
            "num_experts_per_head": 4,
            "query_size": 8,
            "max_position_embeddings": 32,
        },
        "peer_layers": [1],
        "batch_size": 2,
        "text_characters": 100_000,
    }
