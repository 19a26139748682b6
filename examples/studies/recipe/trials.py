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
What the recipe study tries in the training of a run that no flag of run_clm.py gives, and the initialization that runs
share.
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, set_seed
from transformers.optimization import get_scheduler

from modeling_peer import PeerForCausalLM
from modeling_peer.expert_table import ExpertDownProjection, ExpertTable


def share_initialization(model: PeerForCausalLM, seed: int) -> None:
    """
    Gives a new model the weights of a dense one of the same size and seed, wherever they have a parameter of the same
    name and shape: in all but the feed-forwards in which they differ.
    """
    config = type(model.config)(**model.config.to_dict() | {"feed_forward_types": ["dense"] * len(model.model.layers)})
    set_seed(seed)
    dense = PeerForCausalLM(config).state_dict()
    own = model.state_dict()
    with torch.no_grad():
        for name, value in dense.items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)


def apply_trial(
    trainer: Trainer, down_rate: list[float] | None = None, apart: bool = False, dense_moments: bool = False
):
    """
    Changes a trainer before its training.

    Args:
        trainer (`Trainer`): Trainer with a [`RowAdamW`].
        down_rate (`list[float]`, *optional*):
            Factors of the learning rate of down-projection rows at the beginning and at the end of the training; it
            changes by the same factor each step (UltraMem, arXiv 2411.12364, has 10 and 1).
        apart (`bool`, *optional*):
            Whether the gradients of tables and of all else are clipped by norms of their own.
        dense_moments (`bool`, *optional*):
            Whether moments of rows decay in steps that do not touch the row, as those of AdamW do.
    """
    if down_rate is not None:
        _change_down_rate(trainer, *down_rate)
    if apart:
        trainer.add_callback(ClipTablesApart(trainer.args.max_grad_norm))
        trainer.args.max_grad_norm = 0.0
    if dense_moments:
        trainer.add_callback(DecayMoments())


def _change_down_rate(trainer, first, last):
    args, optimizer = trainer.args, trainer.optimizer
    down = {module.weight for module in trainer.model.modules() if isinstance(module, ExpertDownProjection)}
    usual = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(args.max_steps), args.max_steps)

    def changed(rate):
        return lambda step: rate(step) * first * (last / first) ** (step / args.max_steps)

    rates = [
        changed(rate) if down.issuperset(group["params"]) else rate
        for rate, group in zip(usual.lr_lambdas, optimizer.param_groups, strict=True)
    ]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    trainer.lr_scheduler = LambdaLR(optimizer, rates)


def _tables(model) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, ExpertTable)]


class ClipTablesApart(TrainerCallback):
    """Clips the gradient of each table, and that of all else, to a norm."""

    def __init__(self, max_norm: float):
        self.max_norm = max_norm

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        tables = _tables(model)
        known = set(map(id, tables))
        for group in (*([table] for table in tables), [each for each in model.parameters() if id(each) not in known]):
            torch.nn.utils.clip_grad_norm_(group, self.max_norm)


class DecayMoments(TrainerCallback):
    """Lets the moments of the rows that a step touches be those that AdamW has, which moves rows without a gradient."""

    def __init__(self):
        self.last_steps: dict[nn.Parameter, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        for table in _tables(model):
            if table.grad is None or table.grad.factors is None:
                continue
            factors = table.grad.factors
            rows = factors.entries.groups.rows.long()[factors.sums().ne(0).any(1)]
            last = self.last_steps.setdefault(table, torch.zeros(len(table), dtype=torch.long))
            missed = (state.global_step - last[rows]).clamp(min=0)[:, None]
            last[rows] = state.global_step + 1
            if not (own := optimizer.state[table]):
                continue
            for name, beta in zip(("exp_avg", "exp_avg_sq"), groups[id(table)]["betas"], strict=True):
                own[name][rows] *= beta**missed
            own["row_steps"][rows] = state.global_step  # which corrects for the zeros that moments begin with
