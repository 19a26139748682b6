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
Sparse memory finetuning (Lin et al., arXiv 2510.15103): each step moves only the experts that its batch uses more than a
background corpus does.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..analysis.expert_background import ExpertBackground
from ..analysis.expert_sets import ExpertSet, observe_retrievals, select_expert_sets
from ..optim.frozen_rows import FrozenRows, check_can_freeze, freeze_rows, require_gradients


# Those whose hooks are on a model.
_IN_TRAINING: "weakref.WeakSet[SparseFinetuningCallback]" = weakref.WeakSet()


def tf_idf(counts: torch.Tensor, document_counts: torch.Tensor, num_documents: int) -> torch.Tensor:
    """
    How much more a batch uses each expert than the documents of a background do (arXiv 2510.15103, section 3):
    `c(i) / Σ_j c(j) · log((|B| + 1) / (Σ_{b ∈ B} 1[c_b(i) > 0] + 1))`.

    Args:
        counts (`torch.Tensor` of shape `(num_experts,)`): c, how often the batch used each.
        document_counts (`torch.Tensor` of shape `(num_experts,)`): How many documents used each.
        num_documents (`int`): |B|, how many documents there are.

    Returns:
        `torch.Tensor` of shape `(num_experts,)`: float64; zeros if the batch used none.
    """
    frequency = counts.double() / counts.sum().clamp(min=1)
    return frequency * torch.log((num_documents + 1) / (document_counts.double() + 1))


class SparseFinetuningCallback(TrainerCallback):
    """
    Sparse memory finetuning in a `Trainer`: of each set of experts, only those `num_trained_experts` move in a step that
    rank highest in [`tf_idf`] among those that the step's tokens used. What is not used does not move, so fewer may. Ties
    go to the lower number.

    Making it prepares the model, as PEFT does: nothing requires a gradient but the chosen `tables`, also after the
    training. So routers, and query norms with their statistics, stay as they are: with `tables=("down_proj",)` alone,
    what a layer retrieves changes by what lower layers learn, and in the lowest not at all. Experts that
    [`freeze_experts`] holds are left out of the ranking.

    All micro-batches of a step count, and those of all processes; padding and the second forward of activation
    checkpointing do not. Gradients of rows that do not rank are zeroed in the last micro-batch's backward, before clipping
    and reduction, so any optimizer moves only the others, see [`freeze_rows`]; the paper takes SGD, which needs no copy
    of rows. `config.sparse_expert_gradients` may be set. FSDP2 and tensor parallelism are refused.

    With each log of a training loss goes `sparse_finetuning/trained_experts/layer_{i}`, of a graft with the name of its
    adapter after it, the mean number of experts that moved in a step. Each checkpoint gets a copy of the background.

    Hooks are on the model while it trains. A training that was interrupted leaves them, and the last step's choice: until
    another callback is made for the model, or [`~SparseFinetuningCallback.remove`] is called, no other optimizer steps on
    its experts (`RuntimeError`).

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers.
        background ([`ExpertBackground`]): Measured on this model.
        num_trained_experts (`int`, *optional*, defaults to 500):
            t, how many experts of a set move in a step at most. The paper takes 500 for facts, 10,000 for documents.
        tables (iterable of `str`, *optional*, defaults to `("down_proj",)`):
            Which rows of an expert: `"up_proj"` (u), `"gate_proj"`, `"down_proj"` (v, and the values of PKM layers).
        layers (`int` or iterable of `int`, *optional*): Indices of the layers to train, all with experts if not given.

    Raises:
        `ValueError`: for tables, layers or numbers that cannot be, or a background of other experts. The model is left as
            it was.

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
        self.tables = (tables,) if isinstance(tables, str) else tuple(tables)
        background.check(model)
        _check_options(self.sets, num_trained_experts, self.tables)
        self.background = background
        self.num_trained_experts = num_trained_experts
        self._hooks: list = []
        # Of each set, the row freezes of its trained tables, each with the number of the expert of the first row.
        self._causes: dict[str, list[tuple[int, FrozenRows]]] = {}
        self._document_counts: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._num_chosen: dict[str, int] = {}
        self._num_logged: dict[str, list[int]] = {}
        self._counting = False
        trained = self._trained_weights()
        for other in list(_IN_TRAINING):
            if trained & other._trained_weights():
                other.remove()  # what an interrupted training left
        require_gradients(model.parameters(), False)
        require_gradients(trained)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.remove()
        self.background.check(model)
        modules = set(model.modules())
        for name, each in self.sets.items():
            tables = _trained_tables(each, self.tables)
            if not {table for _, table in tables} <= modules:
                raise ValueError(
                    f"The callback was made for another model than the {type(model).__name__} that is trained: {name} is "
                    "not in it. Make it for this one."
                )
            self._causes[name] = [
                (first, freeze_rows(table.weight, torch.zeros(table.num_embeddings, dtype=torch.bool), owner=table))
                for first, table in tables
            ]
            self._document_counts[name] = self.background.document_counts[name].to(tables[0][1].weight.device)
        _IN_TRAINING.add(self)
        self._hooks = observe_retrievals(self.sets, self._count)
        self._hooks.append(register_optimizer_step_pre_hook(partial(self._before_step, optimizer)))
        self._hooks.append(model.register_forward_pre_hook(self._before_forward))
        self._hooks.append(model.register_forward_hook(self._after_forward))

    def on_step_end(self, args, state, control, **kwargs):
        for name, number in self._num_chosen.items():
            self._num_logged.setdefault(self.sets[name].label, []).append(number)
        self._num_chosen, self._counts = {}, {}
        for causes in self._causes.values():
            for _, cause in causes:
                cause.set_rows(torch.zeros_like(cause.frozen_by_others()))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        values = {
            f"sparse_finetuning/trained_experts/{label}": sum(numbers) / len(numbers)
            for label, numbers in self._num_logged.items()
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
        """Takes its hooks off the model, as after a training that came to its end. What it chose to train stays so."""
        _IN_TRAINING.discard(self)
        for hook in self._hooks:
            hook.remove()
        for causes in self._causes.values():
            for _, cause in causes:
                cause.remove()
        self._hooks, self._causes, self._counts, self._num_chosen, self._num_logged = [], {}, {}, {}, {}

    def _train_tables_alone(self, model):
        """Said again, as PEFT's `set_adapter`, which ends `disable_adapter` too, has all of a graft require gradients."""
        trained = self._trained_weights()
        for parameter in model.parameters():
            if parameter not in trained:
                parameter.requires_grad_(False)

    def _trained_weights(self):
        return {table.weight for each in self.sets.values() for _, table in _trained_tables(each, self.tables)}

    def _before_step(self, own_optimizer, optimizer, args, kwargs):
        if own_optimizer is None or optimizer is getattr(own_optimizer, "optimizer", own_optimizer):
            return
        trained = self._trained_weights()
        if any(parameter in trained for group in optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError(
                "A sparse finetuning that did not come to its end holds the experts that another optimizer is to move. Call "
                "`remove()` of its SparseFinetuningCallback, or make a new one."
            )

    @torch.compiler.disable
    def _before_forward(self, model, args):
        self._train_tables_alone(model)
        # Decided here once: a layer may run without gradients and yet be trained, under reentrant checkpointing.
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
        """Chooses once all micro-batches of a step are counted, and before the last one's backward."""
        from accelerate.state import GradientState

        if self._counting and GradientState().sync_gradients:
            for name in self.sets:
                self._choose(name)
        self._counting = False

    def _choose(self, name):
        size, causes = self.sets[name].num_experts, self._causes[name]
        device = causes[0][1].parameter.device
        counts = self._counts.get(name, torch.zeros(size, dtype=torch.int64)).to(device, copy=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        # An expert that is frozen in all trained tables cannot move.
        free = torch.zeros(size, dtype=torch.bool, device=device)
        for first, cause in causes:
            held = cause.frozen_by_others()
            free[first : first + len(held)] |= ~held.to(device)
        scores = tf_idf(counts, self._document_counts[name], self.background.num_documents)
        candidates = (free & (counts > 0)).nonzero()[:, 0]
        order = scores[candidates].sort(descending=True, stable=True).indices
        chosen = candidates[order[: self.num_trained_experts]]
        self._num_chosen[name] = len(chosen)
        held = torch.ones(size, dtype=torch.bool, device=device)
        held[chosen] = False
        for first, cause in causes:
            cause.set_rows(held[first : first + cause.parameter.shape[0]])


def _trained_tables(experts, tables):
    """The tables to train of a set of experts, each with the number of the expert of its first row."""
    return [pair for role in tables for pair in experts.tables.get(role, [])]


def _check_options(sets: dict[str, ExpertSet], num_trained_experts, tables):
    if not isinstance(num_trained_experts, int) or isinstance(num_trained_experts, bool) or num_trained_experts < 1:
        raise ValueError(f"`num_trained_experts` must be a whole number, at least 1, got {num_trained_experts!r}.")
    known = sorted({role for each in sets.values() for role in each.tables})
    if not tables or not set(tables) <= set(known) or len(set(tables)) != len(tables):
        raise ValueError(f"`tables` must be some of {known}, which the model's experts have, got {list(tables)}.")
    for name, each in sets.items():
        trained = _trained_tables(each, tables)
        if not trained:
            raise ValueError(
                f"`tables` must have one of {sorted(each.tables)} for {name}, got {list(tables)}; or leave the layer out of "
                "`layers`."
            )
        for _, table in trained:
            check_can_freeze(table.weight)


__all__ = ["SparseFinetuningCallback", "tf_idf"]
