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
Sparse memory finetuning (Lin et al., arXiv 2510.15103): each step moves only the experts that its batch uses more than
a background corpus does.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..analysis.arguments import check_integer
from ..analysis.expert_background import ExpertBackground
from ..analysis.expert_sets import ExpertSet, observe_retrievals, select_expert_sets
from ..expert_table import refuse_quantized
from ..memory_group import is_split
from ..optim.frozen_rows import FrozenRows, check_can_freeze, freeze_rows, freezes_of, require_gradients
from .freezing import check_background


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
    Trains a model by sparse memory finetuning in a `Trainer`: of each set of experts, a step moves only the
    `num_trained_experts` that rank highest in [`tf_idf`] among those that the step's tokens used. Experts that are not
    used do not move, so fewer may. Ties go to the lower expert index.

    Making the callback prepares the model, as PEFT does: only the chosen `tables` require gradients, also after the
    training. So routers, and query norms with their statistics, stay as they are: with `tables=("down_proj",)` alone,
    what a layer retrieves changes only by what lower layers learn, and not at all in the lowest. Experts that
    [`freeze_experts`] freezes are left out of the ranking.

    All micro-batches of a step count, and those of all processes; padding and the second forward of activation
    checkpointing do not. Gradients of rows that do not rank are zeroed in the last micro-batch's backward, before
    clipping and reduction, so that any optimizer moves only the others (see [`freeze_rows`]). The paper takes SGD,
    which needs no copy of rows. FSDP2, tensor parallelism and memory groups are refused.

    The logs of a training loss get `sparse_finetuning/trained_experts/layer_{i}`, the mean number of experts that
    moved in a step; for a graft the name of its adapter follows. Each checkpoint gets a copy of the background.

    Hooks are on the model while it trains. A training that was interrupted leaves them, and the last step's choice:
    until another callback is made for the model, or [`~SparseFinetuningCallback.remove`] is called, a step of another
    optimizer on its experts raises `RuntimeError`.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers.
        background ([`ExpertBackground`]): Measured on this model.
        num_trained_experts (`int`, *optional*, defaults to 500):
            t, the largest number of experts of a set that move in a step. The paper takes 500 for facts, 10,000 for
            documents.
        tables (`str` or iterable of `str`, *optional*, defaults to `("down_proj",)`):
            Which vectors of an expert to train: `"up_proj"` (u_i), `"gate_proj"`, `"down_proj"` (v_i, and the values
            of PKM layers).
        layers (`int` or iterable of `int`, *optional*): Indices of the layers to train, all with experts if `None`.

    Raises:
        `ValueError`: for arguments of another type, tables or layers that the model does not have, a background of
            other experts, or tables that are split over processes. The model is left as it was.

    ```python
    >>> background = ExpertBackground.measure(model, reference_corpus)
    >>> callback = SparseFinetuningCallback(model, background, num_trained_experts=500)
    >>> args = TrainingArguments("facts", optim="sgd", learning_rate=2.0)
    >>> Trainer(model, args, train_dataset=facts, callbacks=[callback]).train()
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        background: ExpertBackground,
        num_trained_experts: int = 500,
        tables: Iterable[str] = ("down_proj",),
        layers: Iterable[int] | int | None = None,
    ):
        self.sets = select_expert_sets(model, layers)
        check_background("background", background, model)
        self.tables = _checked_tables(self.sets, tables)
        check_integer("num_trained_experts", num_trained_experts)
        self.background = background
        self.num_trained_experts = num_trained_experts
        self._hooks: list = []
        # Of each set, the freezes of its trained tables, each with the index of the expert of the table's first row.
        self._freezes: dict[str, list[tuple[int, FrozenRows]]] = {}
        self._document_counts: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._num_chosen: dict[str, int] = {}
        self._num_logged: dict[str, list[int]] = {}
        self._counting = False
        for each in self.sets.values():
            for _, table in _trained_tables(each, self.tables):
                for freeze in freezes_of(table):
                    if isinstance(freeze.holder, SparseFinetuningCallback):
                        freeze.holder.remove()  # a training that was interrupted left it
        require_gradients(model.parameters(), False)
        require_gradients(self._trained_weights())

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.remove()
        self.background.check(model)
        refuse_quantized(model, "Sparse memory finetuning")
        modules = set(model.modules())
        tables = {name: _trained_tables(each, self.tables) for name, each in self.sets.items()}
        for name, pairs in tables.items():
            if not {table for _, table in pairs} <= modules:
                raise ValueError(
                    f"The callback was made for another model than the {type(model).__name__} that is trained: {name} "
                    "is not in it. Make it for this one."
                )
        for name, pairs in tables.items():
            self._freezes[name] = [(first, self._freeze(table, optimizer)) for first, table in pairs]
            self._document_counts[name] = self.background.document_counts[name].to(pairs[0][1].weight.device)
        self._hooks = observe_retrievals(self.sets, self._count)
        self._hooks.append(model.register_forward_pre_hook(self._before_forward))
        self._hooks.append(model.register_forward_hook(self._after_forward))

    def on_step_end(self, args, state, control, **kwargs):
        for name, num_chosen in self._num_chosen.items():
            self._num_logged.setdefault(self.sets[name].label, []).append(num_chosen)
        self._num_chosen, self._counts = {}, {}
        for freezes in self._freezes.values():
            for _, freeze in freezes:
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
        """Take the hooks and freezes off the model, as the end of a training does. What it trains stays chosen."""
        for hook in self._hooks:
            hook.remove()
        for freezes in self._freezes.values():
            for _, freeze in freezes:
                freeze.remove()
        self._hooks, self._freezes, self._counts, self._num_chosen, self._num_logged = [], {}, {}, {}, {}

    def _freeze(self, table, optimizer):
        """A freeze of no row yet, which keeps other optimizers off the table. `Trainer` has its own wrapped."""
        rows = torch.zeros(table.num_embeddings, dtype=torch.bool)
        return freeze_rows(table, "weight", rows, holder=self, optimizer=getattr(optimizer, "optimizer", optimizer))

    def _train_tables_alone(self, model):
        """In each forward, as PEFT's `set_adapter`, and the end of its `disable_adapter`, let all of a graft train."""
        trained = self._trained_weights()
        for parameter in model.parameters():
            if parameter not in trained:
                parameter.requires_grad_(False)

    def _trained_weights(self):
        return {table.weight for each in self.sets.values() for _, table in _trained_tables(each, self.tables)}

    @torch.compiler.disable
    def _before_forward(self, model, args):
        self._train_tables_alone(model)
        # Decided once, here: under reentrant checkpointing a layer runs without gradients and yet is trained.
        self._counting = model.training and torch.is_grad_enabled()

    def _count(self, name, indices, counts):
        if not self._counting:
            return
        if name not in self._counts:
            size = self.sets[name].num_experts
            self._counts[name] = torch.zeros(size, dtype=torch.int64, device=indices.device)
        own = self._counts[name]
        own.index_add_(0, indices.flatten().to(own.device), counts.flatten().to(own.device, torch.int64))

    @torch.compiler.disable
    def _after_forward(self, model, args, output):
        """Choose once all micro-batches of a step are counted, and before the last one's backward."""
        from accelerate.state import GradientState

        if self._counting and GradientState().sync_gradients:
            for name in self.sets:
                self._choose(name)
        self._counting = False

    def _choose(self, name):
        size, freezes = self.sets[name].num_experts, self._freezes[name]
        device = _trained_tables(self.sets[name], self.tables)[0][1].weight.device
        counts = self._counts.get(name, torch.zeros(size, dtype=torch.int64)).to(device, copy=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        # An expert that is frozen in all trained tables cannot move.
        free = torch.zeros(size, dtype=torch.bool, device=device)
        for first, freeze in freezes:
            held = freeze.frozen_by_others()
            free[first : first + len(held)] |= ~held.to(device)
        scores = tf_idf(counts, self._document_counts[name], self.background.num_documents)
        candidates = (free & (counts > 0)).nonzero()[:, 0]
        order = scores[candidates].sort(descending=True, stable=True).indices
        chosen = candidates[order[: self.num_trained_experts]]
        self._num_chosen[name] = len(chosen)
        held = torch.ones(size, dtype=torch.bool, device=device)
        held[chosen] = False
        for first, freeze in freezes:
            freeze.set_rows(held[first : first + len(freeze.rows)])


def _trained_tables(experts, tables):
    """The tables to train of a set of experts, each with the index of the expert of its first row."""
    return [pair for role in tables for pair in experts.tables.get(role, [])]


def _checked_tables(sets: dict[str, ExpertSet], tables: Any) -> tuple[str, ...]:
    """The tables to train, as a tuple of their names. Raises `ValueError` if they cannot be trained."""
    known = sorted({role for each in sets.values() for role in each.tables})
    chosen = (tables,) if isinstance(tables, str) else tuple(tables) if isinstance(tables, Iterable) else ()
    if not chosen or not all(role in known for role in chosen) or len(set(chosen)) != len(chosen):
        found = list(chosen) if isinstance(tables, Iterable) else tables
        raise ValueError(f"`tables` must be some of {known}, which the model's experts have, got {found!r}.")
    for name, each in sets.items():
        trained = _trained_tables(each, chosen)
        if not trained:
            raise ValueError(
                f"`tables` must have one of {sorted(each.tables)} for {name}, got {list(chosen)}; or leave the "
                "layer out of `layers`."
            )
        for _, table in trained:
            check_can_freeze(table.weight)
            if is_split(table.weight):
                raise ValueError(
                    "The experts of a model whose tables a memory group splits are not chosen by their usage: "
                    "finetune it in one process, or load it in each of several without `distributed_config` and train "
                    "it under DistributedDataParallel."
                )
    return chosen


__all__ = ["SparseFinetuningCallback", "tf_idf"]
