# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
PEER grafts: pools of experts added to other models, as a method of PEFT, which importing this folder registers.

The layer itself is in `graft_layer.py`, models with merged grafts are in `graft_merged.py`, both in the parent folder.
A checkpoint with merged grafts carries these files and loads without PEFT.

LoRA adapts expert tables in its `target_modules` like embeddings, with r · (N + d) parameters per table of N experts
of width d. `up_proj` and `down_proj` match both tables and the linear layers of dense feed-forwards. `mlp.up_proj`
matches only the linear layers, `expert_pool.up_proj` only the tables. IA³ cannot adapt a table.
"""

from .config import PeerGraftConfig
from .model import PeerGraftModel
from .registration import register_peer_graft


register_peer_graft(PeerGraftConfig, PeerGraftModel)
