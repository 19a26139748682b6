# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Sparse memory finetuning (Lin et al., arXiv 2510.15103): each step moves only the experts that its batch uses more than
a background corpus does.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..analysis.expert_background import ExpertBackground
from ..analysis.expert_sets import observe_routers, select_expert_sets
from ..arguments.check_types import check_types
from ..optim.frozen_rows import FrozenRows, check_can_freeze, freeze_rows, freezes_of


def tf_idf(counts: torch.Tensor, document_counts: torch.Tensor, num_documents: int) -> torch.Tensor:
    """
    Score how much more a batch uses each expert than the documents of a background do (arXiv 2510.15103, section 3):
    `c(i) / Σ_j c(j) · log((|B| + 1) / (Σ_{b ∈ B} 1[c_b(i) > 0] + 1))`.

    Args:
        counts (`torch.Tensor` of shape `(num_experts,)`): c, how often the batch used each expert.
        document_counts (`torch.Tensor` of shape `(num_experts,)`): Number of documents that used each expert.
        num_documents (`int`): |B|, the number of documents.

    Returns:
        `torch.Tensor` of shape `(num_experts,)`: float64; zeros if the batch used no expert.
    """
    frequency = counts.double() / counts.sum().clamp(min=1)
    return frequency * torch.log((num_documents + 1) / (document_counts.double() + 1))


class SparseFinetuningCallback(TrainerCallback):
    """
    Trains a model by sparse memory finetuning in a `Trainer`. In each set of experts, a step moves only the
    `num_trained_experts` that rank highest in [`tf_idf`] among those that its tokens used. If they used fewer, fewer
    move. Ties go to the lower expert index.

    Creating the callback prepares the model, as PEFT does: only the chosen `tables` require gradients, also after the
    training. Routers, and query norms with their statistics, stay as they are. Experts that [`freeze_experts`] freezes
    are left out of the ranking.

    All micro-batches of a step in all processes count; padding and the second forward of activation checkpointing do
    not. Gradients of all other rows are zeroed in the last micro-batch's backward, before clipping and reduction, so
    that any optimizer moves only the chosen ones (see [`freeze_rows`]). The paper uses SGD, which needs no copy of
    rows. FSDP2, tensor parallelism and memory groups are refused.

    The logs of a training loss get `sparse_finetuning/trained_experts/layer_{i}`, the mean number of experts that
    moved in a step; for a graft, the name of its adapter follows. Trackers such as TensorBoard see it if the callback
    comes before theirs in `trainer.callback_handler.callbacks`. Each checkpoint gets a copy of the background.

    A training that was interrupted leaves hooks on the model: until another callback is made for it, or
    [`~SparseFinetuningCallback.remove`] is called, a step of another optimizer on its experts raises `RuntimeError`.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers.
        background ([`ExpertBackground`]): Measured on this model.
        num_trained_experts (`int`, *optional*, defaults to 500):
            t, the largest number of experts of a set that move in a step. The paper uses 500 for facts, 10,000 for
            documents.
        tables (`str` or iterable of `str`, *optional*, defaults to `("down_proj",)`):
            Which vectors of an expert to train: `"up_proj"` (u_i), `"gate_proj"`, `"down_proj"` (v_i, and the values
            of PKM layers).
        layers (`int` or iterable of `int`, *optional*): Indices of the layers to train, all with experts if `None`.

    Raises:
        `ValueError`: for tables or layers that the model does not have, a background of other
            experts, or a model that is quantized or split over processes. The model is left as it was.

    ```python
    >>> background = ExpertBackground.measure(model, reference_corpus)
    >>> callback = SparseFinetuningCallback(model, background, num_trained_experts=500)
    >>> args = TrainingArguments("facts", optim="sgd", learning_rate=2.0)
    >>> Trainer(model, args, train_dataset=facts, callbacks=[callback]).train()
    ```
    """

    @check_types
    def __init__(
        self,
        model: nn.Module,
        background: ExpertBackground,
        num_trained_experts: int = 500,
        tables: str | Iterable[str] = ("down_proj",),
        layers: Iterable[int] | int | None = None,
    ):
        if num_trained_experts < 1:
            raise ValueError(f"`num_trained_experts` must be at least 1, got {num_trained_experts}.")
        self.sets = select_expert_sets(model, layers)
        background.check(model)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError("A model that is split over processes cannot be trained by sparse memory finetuning.")
        roles = (tables,) if isinstance(tables, str) else tuple(tables)
        # The tables to train in each set, each with the expert index of its first row.
        self.tables = {
            name: [pair for role in dict.fromkeys(roles) for pair in each.tables.get(role, ())]
            for name, each in self.sets.items()
        }
        known = sorted({role for each in self.sets.values() for role in each.tables})
        if not set(roles) <= set(known) or not all(self.tables.values()):
            raise ValueError(f"`tables` must be some of {known}, at least one of each layer, got {roles}.")
        for weight in self._trained_weights():
            check_can_freeze(weight)
        self.background = background
        self.num_trained_experts = num_trained_experts
        self._hooks: list = []
        self._freezes: dict[str, list[FrozenRows]] = {}  # of the tables of each set
        self._document_counts: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._num_chosen: dict[str, int] = {}
        self._num_logged: dict[str, list[int]] = {}
        self._counting = False
        for module in model.modules():
            for hook in list(module._forward_pre_hooks.values()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, SparseFinetuningCallback):
                    owner.remove()  # a training that was interrupted left it
        model.requires_grad_(False)
        for weight in self._trained_weights():
            weight.requires_grad_(True)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.remove()
        self.background.check(model)
        if not self._trained_weights() <= set(model.parameters()):
            raise ValueError(
                f"The callback was made for another model than the {type(model).__name__} that is trained."
            )
        # `Trainer` passes its optimizer wrapped.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        for name, tables in self.tables.items():
            none_yet = [(table, torch.zeros(table.num_embeddings, dtype=torch.bool)) for _, table in tables]
            self._freezes[name] = [freeze_rows(table, "weight", rows, optimizer=optimizer) for table, rows in none_yet]
            self._document_counts[name] = self.background.document_counts[name].to(tables[0][1].weight.device)
        self._hooks = observe_routers(self.sets, self._count)
        self._hooks.append(model.register_forward_pre_hook(self._before_forward))
        self._hooks.append(model.register_forward_hook(self._after_forward))

    def on_step_end(self, args, state, control, **kwargs):
        for name, num_chosen in self._num_chosen.items():
            self._num_logged.setdefault(self.sets[name].label, []).append(num_chosen)
        self._num_chosen, self._counts = {}, {}
        for freezes in self._freezes.values():
            for freeze in freezes:
                freeze.set_rows(torch.zeros_like(freeze.rows))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        values = {
            f"sparse_finetuning/trained_experts/{label}": sum(num_chosen) / len(num_chosen)
            for label, num_chosen in self._num_logged.items()
        }
        self._num_logged = {}
        logs.update(values)
        # The Trainer has copied the logs into its history by now.
        state.log_history[-1].update(values)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.background.save_pretrained(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and freezes, as the end of training does. The same parameters still require gradients."""
        for hook in self._hooks:
            hook.remove()
        for freezes in self._freezes.values():
            for freeze in freezes:
                freeze.remove()
        self._hooks, self._freezes, self._counts, self._num_chosen, self._num_logged = [], {}, {}, {}, {}

    def _trained_weights(self):
        return {table.weight for tables in self.tables.values() for _, table in tables}

    @torch.compiler.disable
    def _before_forward(self, model, args):
        # In each forward, because PEFT's `set_adapter` and the end of `disable_adapter` make a whole graft trainable.
        trained = self._trained_weights()
        for parameter in model.parameters():
            if parameter not in trained:
                parameter.requires_grad_(False)
        # Decided once, here: under reentrant checkpointing a layer runs without gradients and yet is trained.
        self._counting = model.training and torch.is_grad_enabled()

    def _count(self, name, indices, weights):
        if not self._counting:
            return
        own = self._counts.setdefault(
            name, torch.zeros(self.sets[name].num_experts, dtype=torch.int64, device=indices.device)
        )
        own.index_add_(0, indices.flatten().to(own.device), (weights != 0).flatten().to(own.device, torch.int64))

    @torch.compiler.disable
    def _after_forward(self, model, args, output):
        """Choose once all micro-batches of a step are counted, and before the last one's backward."""
        from accelerate.state import GradientState

        if self._counting and GradientState().sync_gradients:
            for name in self.sets:
                self._choose(name)
        self._counting = False

    def _choose(self, name):
        size, tables = self.sets[name].num_experts, self.tables[name]
        device = tables[0][1].weight.device
        counts = self._counts.get(name, torch.zeros(size, dtype=torch.int64)).to(device, copy=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        # An expert that is frozen in all trained tables cannot move.
        free = torch.zeros(size, dtype=torch.bool, device=device)
        for (first, table), own in zip(tables, self._freezes[name], strict=True):
            held = [freeze.rows.to(device) for freeze in freezes_of(table) if freeze is not own]
            free[first : first + len(own.rows)] |= ~torch.stack(held).any(0) if held else True
        scores = tf_idf(counts, self._document_counts[name], self.background.num_documents)
        candidates = (free & (counts > 0)).nonzero()[:, 0]
        order = scores[candidates].sort(descending=True, stable=True).indices
        chosen = candidates[order[: self.num_trained_experts]]
        self._num_chosen[name] = len(chosen)
        held = torch.ones(size, dtype=torch.bool, device=device)
        held[chosen] = False
        for (first, _), freeze in zip(tables, self._freezes[name], strict=True):
            freeze.set_rows(held[first : first + len(freeze.rows)])
