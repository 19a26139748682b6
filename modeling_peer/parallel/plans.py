# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How Transformers splits a PEER model over processes: the plans of its modules, and additional steps."""

import re
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from transformers.distributed import DistributedConfig

from ..experts import expert_tables
from ..feed_forward import DenseFeedForward, MoeExperts
from ..memory.advice import advise_huge_pages
from ..memory.host_tables import advise_tables
from ..router import QueryBatchNorm
from .columns import TensorParallelGroup, is_split, run_on_columns, tables_left_out
from .memory_group import check_agreement, form_memory_group
from .releases import ensure_process_group, require_parallel_styles


DENSE = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
MOE = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise"}


def init_parallel_plans(method: Any, model: Any) -> None:
    """Add the feed-forward modules of a base model to its plans. Plans of its configuration take precedence."""
    method()
    if model.base_model is not model:
        return
    # Transformers makes plans before weights: the pages of the tables have not been written yet.
    advise_tables(model, advise_huge_pages)
    tables, others = {_in_all_layers(name): "expert_columns" for name in expert_tables(model)}, {}
    for name, module in model.named_modules():
        if isinstance(module, DenseFeedForward):
            others |= {f"{name}.{linear}": style for linear, style in DENSE.items()}
        elif isinstance(module, MoeExperts):
            others |= {name: "moe_tp_experts", **{f"{name}.{each}": style for each, style in MOE.items()}}
    model._tp_plan = {_in_all_layers(name): style for name, style in others.items()} | tables | model._tp_plan
    if hasattr(model, "_ep_plan"):
        model._ep_plan = tables | model._ep_plan


def _in_all_layers(name):
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def prepare_distribute_model(
    method: Any, model_class: type, distributed_config: DistributedConfig | dict | None, *args: Any, **kwargs: Any
) -> Any:
    """
    Prepare as Transformers does. Before processes are grouped, raise `ValueError` if they disagree on
    `distributed_config`, or if `ep_size` is combined with a `tp_size` or `pp_size` above 1.
    """
    if isinstance(distributed_config, dict):
        distributed_config = DistributedConfig(**distributed_config)  # its `from_dict` ignores unknown keys
    if has_several_processes(distributed_config):
        ensure_process_group()
        check_agreement("`distributed_config`", asdict(distributed_config))
        for kind in ("tp", "pp"):
            if _size(distributed_config, "ep") > 1 and _size(distributed_config, kind) > 1:
                raise ValueError(f"`ep_size` needs `{kind}_size` = 1: ranks of a memory group have different tokens.")
    return method(distributed_config, *args, **kwargs)


def has_several_processes(distributed_config: DistributedConfig | None) -> bool:
    """Whether a configuration splits or replicates a model."""
    return any(_size(distributed_config, kind) > 1 for kind in ("tp", "pp", "fsdp", "dp_replicate"))


def _size(distributed_config, kind):
    return getattr(distributed_config, f"{kind}_size", None) or 1  # not all releases have all of them


def maybe_distribute_model(
    method: Any, model_class: type, model: Any, distributed_config: DistributedConfig | None, mesh_manager: Any
) -> Any:
    """Distribute as Transformers does. An `ep_size` splits tables first; tensor parallelism runs on their columns."""
    if mesh_manager is not None and _size(distributed_config, "ep") > 1:
        require_parallel_styles()
        form_memory_group(model, distributed_config.ep_size, mesh_manager.get_mesh("ep").device_type)
    with tables_left_out(model):
        model = method(model, distributed_config, mesh_manager)
    tables = expert_tables(model).values()
    # Not if a custom plan leaves them whole.
    if tables and all(is_split(table.weight, "tp") for table in tables):
        group = mesh_manager.get_mesh("tp").get_group()
        run_on_columns(model, TensorParallelGroup(group))
        for module in model.modules():
            if isinstance(module, QueryBatchNorm):
                module.num_replicas = dist.get_world_size(group)
    return model
