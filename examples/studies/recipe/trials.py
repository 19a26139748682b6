# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Settings that the recipe study tries in trainings and that no flag of run_clm.py gives, and the initialization that
runs share.
"""

from zlib import crc32

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.optimization import get_scheduler

from modeling_peer import PeerForCausalLM
from modeling_peer.experts import expert_tables


def share_initialization(model: PeerForCausalLM, seed: int) -> None:
    """
    Initialize a new model again, each module by random numbers that depend only on the seed, its name and its shapes.
    So models with the same seed have equal weights in all modules that they have in common.
    """
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            parameters = [*module.parameters(recurse=False)]
            for parameter in parameters:
                parameter._is_hf_initialized = False  # Transformers initializes once
            torch.manual_seed(crc32(f"{seed} {name} {[tuple(each.shape) for each in parameters]}".encode()))
            model._init_weights(module)


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
            Whether the gradient of each table, and that of all other parameters, is clipped by a norm of its own.
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
    tables = expert_tables(trainer.model).items()
    down = {table.weight for name, table in tables if name.endswith((".down_proj", ".values"))}
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
    return [table.weight for table in expert_tables(model).values()]


class ClipTablesApart(TrainerCallback):
    """Clips the gradient of each table, and that of all other parameters, to a maximum norm."""

    def __init__(self, max_norm: float):
        self.max_norm = max_norm

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        tables = _tables(model)
        known = set(map(id, tables))
        for group in (*([table] for table in tables), [each for each in model.parameters() if id(each) not in known]):
            torch.nn.utils.clip_grad_norm_(group, self.max_norm)


class DecayMoments(TrainerCallback):
    """Decays the moments of rows that a step touches for the steps that have missed these rows, as AdamW would."""

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        for table in _tables(model):
            own = optimizer.state[table]
            if not own or table.grad is None:
                continue
            rows = table.grad.ne(0).any(1).nonzero().squeeze(1)
            # The number of steps of a row counts all steps up to its last, so that the bias of m and v is corrected.
            missed = (state.global_step - own["row_steps"][rows]).clamp(min=0)[:, None]
            for name, beta in zip(("exp_avg", "exp_avg_sq"), groups[id(table)]["betas"], strict=True):
                own[name][rows] *= beta**missed
            own["row_steps"][rows] = state.global_step
