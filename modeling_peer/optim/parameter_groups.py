# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameter groups with rows and learning rates of their own, and the optimizer for a `Trainer`."""

import math
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..arguments.check_types import check_types
from ..experts import expert_tables
from ..modeling_peer import ALL_CHECKPOINT_FUNCTIONS
from .embedding_rows import embeddings_of, let_gradients_come_in_factors
from .frozen_rows import freezes_of
from .row_adamw import RowAdamW


if TYPE_CHECKING:
    from transformers import TrainingArguments


# As in `Trainer.get_decay_parameter_names`.
NAMES_WITHOUT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

# Attribute by which DistributedDataParallel ignores parameters of a model; `parallel` finds them.
IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"

# The rate of u_i and gates of experts as a multiple of that of all other parameters, and the rate of v_i as a multiple
# of this. Those of text are of the scaling study, those of facts of the capacity study.
RATES = {"text": (0.25, 192.0), "facts": (4.0, 96.0)}

# The default of `TrainingArguments`, which is meant for fine-tuning.
LEARNING_RATE_OF_TRAINER = 5e-5


def learning_rate_of_new_model(hidden_size: int) -> float:
    """
    Return the learning rate of all but the expert tables for a model that is trained from scratch. It is the best of
    three of the scaling study at a width of 64, 4e-3, times 64 / `hidden_size` above it. At 768 it is a usual rate.
    """
    return float(f"{min(4e-3, 4e-3 * 64 / hidden_size):.2g}")


@check_types
def expert_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    expert_lr_multiplier: float = 1.0,
    down_proj_lr_multiplier: float = 1.0,
    embeddings: bool = False,
) -> list[dict[str, Any]]:
    """
    Group a model's trainable parameters for [`RowAdamW`]: those with and without weight decay, as in `Trainer`, and
    the expert tables, as rows. A table that several layers share is in one group, once.

    With `embeddings`, every `nn.Embedding` and `nn.EmbeddingBag` of any model is rows too: a step moves the rows of
    its tokens. Embeddings that share weights with a head are left out.

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
        embeddings (`bool`, *optional*, defaults to `False`): Whether embeddings are rows too.

    Returns:
        `list[dict]`: groups with `params`, `lr`, `weight_decay` and `rows`. No group is empty.

    Raises:
        `ValueError`: for a negative number, or with `embeddings`, if one of them has `sparse=True`.
    """
    for name, value in (("expert", expert_lr_multiplier), ("down_proj", down_proj_lr_multiplier)):
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}_lr_multiplier` must be a number, at least 0, got {value}.")
    tables = {
        id(module.weight): "down_tables" if name.endswith(("down_proj", "values")) else "tables"
        for name, table in expert_tables(model).items()
        for module in table.modules()  # an adapter may have wrapped the table, or a copy of it
        if isinstance(module, nn.Embedding)
    }
    if embeddings:
        for embedding in embeddings_of(model):
            # The kernels of experts handle the gradients of their own tables.
            if tables.setdefault(id(embedding.weight), "embeddings") == "embeddings":
                let_gradients_come_in_factors(embedding)
        if not hasattr(type(model), IGNORED_BY_DDP):  # a PEER model tells DDP itself
            names = ALL_CHECKPOINT_FUNCTIONS[IGNORED_BY_DDP](model)
            setattr(model, IGNORED_BY_DDP, list(dict.fromkeys([*getattr(model, IGNORED_BY_DDP, ()), *names])))
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NAMES_WITHOUT_DECAY))
    names = ("decayed", "not_decayed", "tables", "down_tables", "embeddings")
    kinds: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[tables.get(id(parameter), "decayed" if name in decayed else "not_decayed")].append(parameter)
    expert_lr = learning_rate * expert_lr_multiplier
    options = {
        "decayed": (learning_rate, weight_decay, False),
        "not_decayed": (learning_rate, 0.0, False),
        "tables": (expert_lr, weight_decay, True),
        "down_tables": (expert_lr * down_proj_lr_multiplier, weight_decay, True),
        "embeddings": (learning_rate, weight_decay, True),
    }
    return [
        {"params": kinds[kind], "lr": lr, "weight_decay": decay, "rows": rows}
        for kind, (lr, decay, rows) in options.items()
        if kinds[kind]
    ]


@check_types
def make_optimizer(
    model: nn.Module,
    args: "TrainingArguments",
    expert_lr_multiplier: float | None = None,
    down_proj_lr_multiplier: float | None = None,
    second_moment: str = "full",
    first_moment: str | None = "full",
    embeddings: bool = False,
    rates: str = "text",
) -> RowAdamW:
    """
    Make the optimizer for a `Trainer` that trains expert tables or large embeddings: [`RowAdamW`] with the learning
    rate, weight decay and betas of the training arguments, and with rates of their own for the tables.

    It warns if a new model would be trained at the default learning rate of `TrainingArguments`. It also warns if a
    model that [`add_experts`] enlarged would train its original experts, with none of them frozen. Freezes are not
    saved or copied with a model: [`train_added_experts_only`] restores them.

    Args:
        model (`nn.Module`): The model that is given to `Trainer`.
        args (`TrainingArguments`): Those that are given to `Trainer`.
        expert_lr_multiplier, down_proj_lr_multiplier (`float`, *optional*):
            See [`expert_parameter_groups`]. They default to those of `rates`. If a part of the model is frozen, as
            with a graft or added experts, they default to 1.0. Fine-tuning a whole model may not need others either:
            pass 1.0 for both.
        second_moment (`str`, *optional*, defaults to `"full"`), first_moment (`str`, *optional*):
            See [`RowAdamW`].
        embeddings (`bool`, *optional*, defaults to `False`): See [`expert_parameter_groups`].
        rates (`str`, *optional*, defaults to `"text"`):
            What a model that is trained from scratch is to learn. `"text"` gives 0.25 and 192, which the scaling study
            found on a small budget. `"facts"`, for what is repeated and to be stored, gives 4 and 96, which are good
            for 4,096 and for 16,384 experts in the capacity study.

    Returns:
        [`RowAdamW`]

    Raises:
        `ValueError`: for other `rates`.

    ```python
    >>> from modeling_peer import make_optimizer

    >>> trainer = Trainer(model, args, train_dataset=dataset, optimizers=(make_optimizer(model, args), None))
    ```
    """
    grown = getattr(getattr(model, "config", None), "expert_additions", None)
    tables = [table for name, table in expert_tables(model).items() if ".added." not in name] if grown else []
    if any(table.weight.requires_grad and not freezes_of(table) for table in tables):
        warnings.warn(
            "The model trains the experts that it had before `add_experts`. If only the added ones are to be trained, "
            "call `train_added_experts_only(model)` before the optimizer is made.",
            stacklevel=2,
        )
    config = getattr(model, "config", None)
    # The name of a new model may be that of the configuration it was made with.
    is_new = not getattr(model, "was_loaded", getattr(model, "name_or_path", True))
    if args.learning_rate == LEARNING_RATE_OF_TRAINER and is_new and hasattr(config, "hidden_size"):
        warnings.warn(
            f"`learning_rate` is {args.learning_rate}, the default of `Trainer` for models that are trained further, "
            f"and this model is new: take about {learning_rate_of_new_model(config.hidden_size)}.",
            stacklevel=2,
        )
    if rates not in RATES:
        raise ValueError(f"`rates` must be one of {list(RATES)}, got {rates!r}.")
    is_whole = all(parameter.requires_grad for parameter in model.parameters())
    defaults = RATES[rates] if is_whole else (1.0, 1.0)
    given = expert_lr_multiplier, down_proj_lr_multiplier
    up, down = (default if each is None else each for each, default in zip(given, defaults, strict=True))
    groups = expert_parameter_groups(model, args.learning_rate, args.weight_decay, up, down, embeddings)
    betas = args.adam_beta1, args.adam_beta2
    return RowAdamW(groups, betas=betas, eps=args.adam_epsilon, second_moment=second_moment, first_moment=first_moment)
