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
"""Which parameters an optimizer moves by rows and how fast, and the optimizer for a `Trainer`."""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..expert_table import ExpertDownProjection, ExpertTable
from .row_adamw import RowAdamW


if TYPE_CHECKING:
    from transformers import TrainingArguments


# As in `Trainer.get_decay_parameter_names`.
NAMES_WITHOUT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

# The rates of the scaling study, as multiples of the learning rate of all else: u_i and gates of experts at a quarter,
# v_i at 192 times that.
EXPERT_LR_MULTIPLIER = 0.25
DOWN_PROJ_LR_MULTIPLIER = 192.0


def expert_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    expert_lr_multiplier: float = 1.0,
    down_proj_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """
    Group a model's trainable parameters for [`RowAdamW`]: those with weight decay and those without, as `Trainer` has
    them, and the expert tables, as rows. A table that several layers share is in one group, once.

    Args:
        model (`nn.Module`)
        learning_rate (`float`)
        weight_decay (`float`, *optional*, defaults to 0.0): Of all parameters except biases and norms.
        expert_lr_multiplier (`float`, *optional*, defaults to 1.0): Factor of the learning rate of expert tables.
            Schedulers scale each group's own learning rate, so the factor lasts.
        down_proj_lr_multiplier (`float`, *optional*, defaults to 1.0): Further factor of the learning rate of the
            down-projection vectors v_i, and of the values of PKM layers. The router weights of a head sum to one, so
            its vectors must become up to k times as large as those of a dense projection, which takes as many more
            steps at the same learning rate.

    Returns:
        `list[dict]`: groups with `params`, `lr`, `weight_decay` and `rows`. No group is empty.
    """
    tables = {
        id(module.weight): "down_tables" if isinstance(module, ExpertDownProjection) else "tables"
        for module in model.modules()
        if isinstance(module, ExpertTable)
    }
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NAMES_WITHOUT_DECAY))
    kinds: dict[str, list[nn.Parameter]] = {"decayed": [], "not_decayed": [], "tables": [], "down_tables": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = tables.get(id(parameter), "decayed" if name in decayed else "not_decayed")
            kinds["tables" if down_proj_lr_multiplier == 1.0 and kind == "down_tables" else kind].append(parameter)
    lr, expert_lr = learning_rate, learning_rate * expert_lr_multiplier
    down_lr = expert_lr * down_proj_lr_multiplier
    groups = [
        {"params": kinds["decayed"], "lr": lr, "weight_decay": weight_decay, "rows": False},
        {"params": kinds["not_decayed"], "lr": lr, "weight_decay": 0.0, "rows": False},
        {"params": kinds["tables"], "lr": expert_lr, "weight_decay": weight_decay, "rows": True},
        {"params": kinds["down_tables"], "lr": down_lr, "weight_decay": weight_decay, "rows": True},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module,
    args: "TrainingArguments",
    expert_lr_multiplier: float | None = None,
    down_proj_lr_multiplier: float | None = None,
    second_moment: str = "full",
) -> RowAdamW:
    """
    Make the optimizer for a `Trainer` that trains expert tables: [`RowAdamW`] with the learning rate, weight decay and
    betas of the training arguments, and with rates of their own for the tables.

    Args:
        model (`nn.Module`): The model that is given to `Trainer`.
        args (`TrainingArguments`): Those that are given to `Trainer`.
        expert_lr_multiplier, down_proj_lr_multiplier (`float`, *optional*):
            See [`expert_parameter_groups`]. They default to 0.25 and 192, which the scaling study found for models
            that are trained from scratch on a small budget, and to 1.0 where a part of the model is frozen, as beside
            a graft or added experts. A whole model that is trained further may need none either: pass 1.0 for both.
        second_moment (`str`, *optional*, defaults to `"full"`): See [`RowAdamW`].

    Returns:
        [`RowAdamW`]

    ```python
    >>> from modeling_peer import make_optimizer

    >>> trainer = Trainer(model, args, train_dataset=dataset, optimizers=(make_optimizer(model, args), None))
    ```
    """
    is_whole = all(parameter.requires_grad for parameter in model.parameters())
    if expert_lr_multiplier is None:
        expert_lr_multiplier = EXPERT_LR_MULTIPLIER if is_whole else 1.0
    if down_proj_lr_multiplier is None:
        down_proj_lr_multiplier = DOWN_PROJ_LR_MULTIPLIER if is_whole else 1.0
    groups = expert_parameter_groups(
        model, args.learning_rate, args.weight_decay, expert_lr_multiplier, down_proj_lr_multiplier
    )
    betas = (args.adam_beta1, args.adam_beta2)
    return RowAdamW(groups, betas=betas, eps=args.adam_epsilon, second_moment=second_moment)


__all__ = ["expert_parameter_groups", "make_optimizer"]
