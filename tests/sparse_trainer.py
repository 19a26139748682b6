# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests of sparse finetuning: its trainer, and an observer of what each step retrieves and moves."""

import copy

import torch
from background_models import measured, model_of_three
from table_gradients import dense
from trainer_worker import copy_of_state, counting_sequences, trainer_of
from transformers import TrainerCallback

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.analysis.expert_sets import find_expert_sets
from modeling_peer.continual.sparse_finetuning import SparseFinetuningCallback


class Observer(TrainerCallback):
    """What a training retrieved in each step, by layer; what the gradients were; and which rows moved."""

    def __init__(self):
        self.steps, self.inputs, self.gradients, self.moved = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.retrieved = {name: [] for name in find_expert_sets(model)}
        for name, each in find_expert_sets(model).items():
            for router in each.routers:
                router.register_forward_hook(lambda *call, name=name: self.record(name, *call))
        model.register_forward_pre_hook(lambda module, args, kwargs: self.keep(module, kwargs), with_kwargs=True)

    def record(self, name, router, args, output):
        if self.learns and torch._C._current_graph_task_id() == -1:
            self.retrieved[name].append((output[0].clone(), args[1].clone()))

    def keep(self, model, kwargs):
        self.learns = model.training and torch.is_grad_enabled()
        if self.learns:
            self.inputs.append({name: copy.deepcopy(value) for name, value in kwargs.items()})

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.model, self.inputs, self.before = copy.deepcopy(model), [], copy_of_state(model)
        for records in self.retrieved.values():
            records.clear()
        # Forwards from which nothing is learned.
        model.eval()(torch.full((1, 40), 51))
        with torch.no_grad():
            model.train()(torch.full((1, 40), 50))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {name: dense(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        )
        # What the gradients are without anything frozen.
        for module in self.model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.model.enable_input_require_grads()  # for reentrant checkpointing
        self.model.zero_grad()
        for kwargs in self.inputs:
            self.model(**kwargs).loss.backward()
        whole = {name: dense(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients[-1] = (self.gradients[-1], whole)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: list(records) for name, records in self.retrieved.items()})
        self.moved.append(
            {name: p.ne(self.before[name]).flatten(1).any(1) for name, p in model.named_parameters() if p.ndim == 2}
        )


OPTIMIZERS = {
    "stock": {"weight_decay": 0.1},
    "sgd": {"optim": "sgd", "learning_rate": 1.0},
    "rows": {},
}
T = 6


def sparse_trainer(
    folder, optimizer="stock", t=T, tables=("down_proj",), observer=None, seed=0, num_examples=42, **options
):
    model = model_of_three(seed=seed)
    background = measured(model_of_three())
    callback = SparseFinetuningCallback(model, background, t, tables)
    callbacks = [callback] if observer is None else [observer, callback]
    defaults = {"max_steps": 6, "max_grad_norm": 1e6, **OPTIMIZERS[optimizer]}
    trainer = trainer_of(
        model, folder, counting_sequences(num_examples, seed=5), callbacks=callbacks, **{**defaults, **options}
    )
    if optimizer == "rows":
        trainer.optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1))
    return trainer, background
