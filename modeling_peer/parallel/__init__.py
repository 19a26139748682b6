# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training on many processes: memory groups, tensor parallelism, replicas, and checkpoints of split models. Importing
registers, for the models of the core, how Transformers splits, loads and saves them.
"""

from ..modeling_peer import CheckpointInterface, PeerForCausalLM
from .columns import ExpertColumns
from .gradient_exchange import leave_tables_out_of_ddp
from .plans import init_parallel_plans, maybe_distribute_model, prepare_distribute_model
from .releases import PARALLEL_STYLES, show_cache_name
from .split_checkpoints import from_pretrained, gather_sharded_state_dict_for_save, load_state_dict, save_pretrained


if PARALLEL_STYLES is not None:
    PARALLEL_STYLES.register("expert_columns", ExpertColumns())

for _extend in (
    from_pretrained,
    save_pretrained,
    load_state_dict,
    gather_sharded_state_dict_for_save,
    init_parallel_plans,
    prepare_distribute_model,
    maybe_distribute_model,
):
    CheckpointInterface.register(_extend.__name__, _extend)
CheckpointInterface.register("_ddp_params_and_buffers_to_ignore", leave_tables_out_of_ddp)

show_cache_name(PeerForCausalLM)
