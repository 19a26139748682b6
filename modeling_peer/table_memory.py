# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Where the expert tables of a model lie in memory: mapped from a file, and in host memory beside a GPU.

accelerate copies what a `device_map` puts on `"cpu"` to the GPU whenever it runs, and a table is gigabytes of which a
token needs a few rows. A table stays where it is instead, and its experts run there: for each token, its hidden state
goes to the host and dot products come back, and likewise router weights and the sum, and the indices with either:
2 · hidden_size + 4 · num_active elements in all, where its rows would be 2 · hidden_size · num_active. Gated experts
have a third table, to which the hidden state goes once more.

```python
>>> from modeling_peer import PeerConfig, PeerForCausalLM, host_table_device_map

>>> config = PeerConfig.from_pretrained("path/to/a/peer/checkpoint")
>>> device_map = host_table_device_map(PeerForCausalLM, config, device=0)
>>> model = PeerForCausalLM.from_pretrained("path/to/a/peer/checkpoint", device_map=device_map)
```
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .expert_table import ExpertTable


def host_table_device_map(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, device: int | str | torch.device
) -> dict[str, int | str | torch.device]:
    """
    Make a `device_map` that leaves the expert tables of a model in host memory and puts everything else on a device.

    Args:
        model_class (`type`): Class of the model, such as [`PeerForCausalLM`].
        config ([`PeerConfig`])
        device (`int`, `str` or `torch.device`): Where the rest of the model goes.

    Returns:
        `dict[str, int | str | torch.device]`: by the name of a module, or of a parameter of its own beside tables.
    """
    with torch.device("meta"):
        model = model_class(config)
    return dict(_places(model, "", device))


def _places(module, prefix, device):
    if isinstance(module, ExpertTable):
        yield prefix, "cpu"
    elif not any(isinstance(each, ExpertTable) for each in module.modules()):
        yield prefix, device
    else:
        dot = f"{prefix}." if prefix else ""
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield dot + name, device
        for name, child in module.named_children():
            yield from _places(child, dot + name, device)


def keep_in_host_memory(model: nn.Module) -> None:
    """
    Take accelerate's hooks off the expert tables that it would copy from host memory to a device in each forward.
    Tables that are offloaded to disk keep theirs.
    """
    hooked = [each for each in model.modules() if isinstance(each, ExpertTable) and hasattr(each, "_hf_hook")]
    if not hooked:
        return
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

    for table in hooked:
        hook = table._hf_hook
        if isinstance(hook, AlignDevicesHook) and hook.offload and hook.original_devices["weight"].type == "cpu":
            remove_hook_from_module(table)
            del table.forward  # what is left of the hook is the method of the class


def advise_tables(model: nn.Module, advise: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give advice of `memory_advice.py` on all expert tables of a model."""
    for table in model.modules():
        if isinstance(table, ExpertTable):
            advise(table.weight)
