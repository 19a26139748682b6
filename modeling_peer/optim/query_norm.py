# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Trained query BatchNorms in further training. Importing registers a warning with the models of the core."""

from typing import Any

from torch import nn
from transformers.utils import logging

from ..arguments.check_types import check_types
from ..modeling_peer import CheckpointInterface
from ..router import QueryBatchNorm


logger = logging.get_logger(__name__)


@check_types
def freeze_query_norm(model: nn.Module) -> None:
    """
    Let a trained model use the running statistics of its query BatchNorms in training. These and the weights of the
    norms no longer change, and every token is computed in training as in evaluation.

    Trainers that compare a policy with a reference or with its own earlier outputs, such as `DPOTrainer` and
    `GRPOTrainer` of TRL, need it when they train all parameters: otherwise only the policy normalizes queries by the
    moments of its batch. An adapter of other modules needs nothing, because PEFT freezes the norms with the rest.

    Call it before the training starts, and again after loading or copying the model. `requires_grad_(True)` of a norm
    undoes it, and so does `set_adapter` of PEFT for the norm of a graft: for grafts with `query_norm="batch"`, call it
    on the `model` of the finished trainer.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers, also a model they are grafted onto.
    """
    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            module.requires_grad_(False)


def train(method: Any, model: Any, mode: bool = True) -> Any:
    """Set the mode as in torch. Warn once how a loaded model normalizes queries in training."""
    norms = (module for module in model.modules() if isinstance(module, QueryBatchNorm))
    if mode and getattr(model, "was_loaded", False) and any(norm.weight.requires_grad for norm in norms):
        logger.warning_once(
            "In training, this model normalizes queries by the moments of each batch, and its reference in "
            "`DPOTrainer`, `GRPOTrainer` and the like by the running statistics that were loaded. Before such a "
            "training call `freeze_query_norm(model)`."
        )
    return method(mode)


CheckpointInterface.register("train", train)
