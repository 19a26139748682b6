# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Expert tables in host memory, beside a model on a GPU.

accelerate copies modules that a `device_map` puts on `"cpu"` to the GPU whenever they run, but a token needs only a
few rows of a table of gigabytes. Here tables stay in host memory, and their pools run there. The hidden state, expert
indices and router weights of a token go to the host, and the weighted sum comes back. These are
2 · hidden_size + 2 · num_active elements, whereas its rows have 2 · hidden_size · num_active.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..arguments.check_types import check_types
from ..experts import expert_tables


@check_types
def host_table_device_map(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, device: int | str | torch.device
) -> dict[str, int | str | torch.device]:
    """
    Make a `device_map` that leaves the expert tables of a model in host memory and puts everything else on a device.

    Args:
        model_class (`type`): Class of the model, such as [`PeerForCausalLM`].
        config ([`PeerConfig`])
        device (`int`, `str` or `torch.device`): Where the rest of the model goes.
    """
    with torch.device("meta"):
        model = model_class(config)
    return dict(_places(model, "", device, set(expert_tables(model).values())))


def _places(module, prefix, device, tables):
    if module in tables:
        yield prefix, "cpu"
    elif tables.isdisjoint(module.modules()):
        # Accelerate would also move the inputs of a module without tensors: the activation of experts.
        if [*module.parameters(), *module.buffers()]:
            yield prefix, device
    else:
        dot = f"{prefix}." if prefix else ""
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield dot + name, device
        for name, child in module.named_children():
            yield from _places(child, dot + name, device, tables)


def keep_in_host_memory(model: nn.Module) -> None:
    """
    Take accelerate's hooks off the expert tables that it would copy from host memory to a device in each forward, and
    let pools whose tables are in host memory run there. Tables that are offloaded to disk keep their hooks.
    """
    hooked: list[Any] = [table for table in expert_tables(model).values() if hasattr(table, "_hf_hook")]
    if hooked:
        from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

        for table in hooked:
            hook = table._hf_hook
            if isinstance(hook, AlignDevicesHook) and hook.offload and hook.original_devices["weight"].type == "cpu":
                remove_hook_from_module(table)
                del table.forward  # the hook leaves the method of the class there
    if all(parameter.is_cpu for parameter in model.parameters()) and not hooked:
        return
    for pool in model.modules():
        for name in getattr(type(pool), "expert_table_names", ()):
            table = getattr(pool, name)
            if table is not None and table.weight.is_cpu:
                method = "sum_values" if hasattr(pool, "sum_values") else "forward"
                setattr(pool, method, partial(_run_in_host_memory, pool, method))


def _run_in_host_memory(pool, method, hidden_states, rows, weights):
    output = getattr(type(pool), method)(pool, hidden_states.to("cpu"), rows.to("cpu"), weights.to("cpu"))
    return output.to(hidden_states.device)


def advise_tables(model: nn.Module, advise: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply a function of `memory/advice.py` to all expert tables of a model."""
    for table in expert_tables(model).values():
        for parameter in table.parameters():
            advise(parameter)
