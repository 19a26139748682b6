# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
PEER grafts: pools of experts added to other models, as a method of PEFT, which importing this folder registers.

The layer itself is in `graft_layer.py`, models with merged grafts are in `graft_merged.py`, both beside this folder: a
checkpoint with merged grafts carries these two files, and loads without PEFT.

LoRA adapts the expert tables that its `target_modules` name as it adapts embeddings, with r · (N + d) parameters each
for N experts of width d. `up_proj` and `down_proj` name tables and the linear layers of dense feed-forwards alike:
`mlp.up_proj` names the linear layers alone, `expert_pool.up_proj` the tables. IA³ cannot adapt a table.
"""

from .config import PeerGraftConfig
from .model import PeerGraftModel
from .registration import register_peer_graft


register_peer_graft(PeerGraftConfig, PeerGraftModel)
