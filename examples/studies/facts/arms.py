# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The arms of the study of facts: ways to teach new facts to a pretrained model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, set_seed

from modeling_peer import ExpertBackground, SparseFinetuningCallback
from studies.common.arms import train, with_rates
from studies.facts.sentences import collate
from studies.facts.study import Study, measure


class MeasureCallback(TrainerCallback):
    """
    Measures a model during training, most often at first, where most is learned: at the squares of equal fractions.
    """

    def __init__(self, study: Study):
        self.study = study
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        number = len(self.points) + 1
        if state.global_step >= state.max_steps * (number / self.study.args.measurements) ** 2:
            self.points.append({"step": state.global_step, **measure(model, self.study)})


def train_facts(
    model: nn.Module, study: Study, hyperparameters: dict[str, float], seed: int, callbacks: list[TrainerCallback]
) -> list[dict[str, Any]]:
    """
    Trains the parameters that require a gradient on the new facts, and returns the measurements of
    [`MeasureCallback`]. The learning rate is constant after a warm-up, so that each measured model is one that a
    shorter training would end with.
    """
    measuring = MeasureCallback(study)
    train(
        model,
        [asdict(sentence) for sentence in study.taught],
        study.folder / "trainer",
        hyperparameters["learning_rate"],
        study.args.steps,
        study.args.batch_size,
        collate,
        [*callbacks, measuring],
        lr_scheduler_type="constant_with_warmup",
        bf16=not study.args.full_precision,
        use_cpu=True,
        seed=seed,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
    )
    return measuring.points


def full_finetuning(study: Study, hyperparameters: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """Trains all parameters."""
    return study.load_model(), []


def lora(study: Study, hyperparameters: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """Trains an adapter of rank 16 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(study.load_model(), config), []


def graft(study: Study, hyperparameters: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """Trains all parameters of a graft."""
    return load_graft(study), []


def sparse_graft(study: Study, hyperparameters: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """
    Trains, in each graft, the v (with `train_u` also the u) of the t experts that a step uses most and the background
    least.
    """
    model = load_graft(study)
    background = ExpertBackground.from_pretrained(study.folder / "graft")
    number = int(hyperparameters["num_trained_experts"])
    tables = ("up_proj", "down_proj") if hyperparameters["train_u"] else ("down_proj",)
    return model, [SparseFinetuningCallback(model, background, number, tables)]


def load_graft(study: Study) -> nn.Module:
    """
    Loads the model with a graft whose output is still zero. The graft is made once, together with its background
    counts.

    Its query norms get their statistics from general text. The background counts are those of the same text and of the
    sentences that teach: experts that most of these sentences use encode their form, not one fact.
    """
    from peft import PeftModel, get_peft_model

    from modeling_peer.graft.model import PeerGraftConfig

    folder = study.folder / "graft"
    if not folder.exists():
        set_seed(0)
        config = PeerGraftConfig(
            layers_to_transform=study.args.graft_layers,
            num_experts=study.args.num_experts,
            num_retrieval_heads=4,
            num_experts_per_head=8,
            query_size=128,
            query_norm="batch",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(study.load_model(), config)
        unfinished = study.folder / "graft-unfinished"
        with study.autocast():
            settle_query_norms(model, study.background)
            background = ExpertBackground.measure(model, study.background, progress_bar=False)
            taught = [{"input_ids": sentence.input_ids} for sentence in study.taught]
            background.update(ExpertBackground.measure(model, taught, study.args.batch_size, progress_bar=False))
        background.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    return PeftModel.from_pretrained(study.load_model(), folder, is_trainable=True)


def settle_query_norms(model: nn.Module, blocks: Dataset, batch_size: int = 8) -> None:
    """Updates the running statistics of query norms by forwards in training mode. No weight changes."""
    model.train()
    for batch in blocks.iter(batch_size=batch_size):
        model(input_ids=torch.tensor(batch["input_ids"]), logits_to_keep=1)
    model.eval()


@dataclass(frozen=True)
class Arm:
    """
    One way to teach new facts to the base model.

    Args:
        label (`str`): Label in tables and plots.
        prepare (`Callable`):
            Returns the model, in which what to train requires a gradient, and callbacks of the training.
        sweep (`tuple[dict]`): Hyperparameters to try.
    """

    label: str
    prepare: Callable[[Study, dict[str, float]], tuple[nn.Module, list[TrainerCallback]]]
    sweep: tuple[dict[str, float], ...]


ARMS = {
    "full": Arm("full finetuning", full_finetuning, with_rates(1e-5, 3e-5, 1e-4)),
    "lora": Arm("LoRA", lora, with_rates(1e-4, 3e-4, 1e-3)),
    "graft": Arm("graft, all rows", graft, with_rates(1e-3, 3e-3, 1e-2)),
    "sparse": Arm(
        "graft, sparse finetuning",
        sparse_graft,
        with_rates(1.0, 3.0, 10.0, num_trained_experts=1024, train_u=0)
        + with_rates(3.0, num_trained_experts=4096, train_u=0)
        + with_rates(3e-2, num_trained_experts=1024, train_u=1),
    ),
}
