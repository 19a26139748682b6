# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The arms of the study of streams: ways to teach a trained model a new text, stage by stage.

An arm is a function `(model, stage, hyperparameters) -> model`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from modeling_peer import ExpertBackground, SparseFinetuningCallback, add_experts, fit_gates, generate_text
from modeling_peer.experts import expert_tables
from studies.common.finetuning import train


REPLAYED_SHARE = 0.05

REFERENCE_SEQUENCES, BACKGROUND_SEQUENCES = 128, 256

ADDED_SIDE, ADDED_ROWS = 64, 16  # 4,096 protected experts, or 16 more rows and columns of the key grid


@dataclass
class Stage:
    """
    One text to learn.

    Args:
        blocks (`Dataset`): Sequences of the text, shuffled.
        earlier (`list[Dataset]`): Sequences of each earlier text; the first is that of the pre-training.
        steps (`int`): Number of training steps.
        batch_size (`int`): Number of sequences per step.
        folder (`Path`): Output folder of the `Trainer`.
        seed (`int`): Seed of the training.
    """

    blocks: Dataset
    earlier: list[Dataset]
    steps: int
    batch_size: int
    folder: Path
    seed: int

    def sequences(self, dataset: Dataset, number: int) -> Dataset:
        """The first sequences of a text, at most `number`."""
        return dataset.select(range(min(number, len(dataset))))

    def reference(self, number: int) -> Dataset:
        """At most `number` sequences of all earlier texts, the same number of each."""
        return concatenate_datasets([self.sequences(each, number // len(self.earlier)) for each in self.earlier])


def train_stage(
    model: nn.Module,
    stage: Stage,
    learning_rate: float,
    blocks: Dataset | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> None:
    """Trains the parameters that require a gradient on the text of a stage, or on `blocks` in its place."""
    train(
        model,
        blocks or stage.blocks,
        stage.folder,
        learning_rate,
        stage.steps,
        stage.batch_size,
        callbacks=callbacks,
        seed=stage.seed,
    )


def full_finetuning(model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]) -> PreTrainedModel:
    """Trains all parameters."""
    train_stage(model, stage, hyperparameters["learning_rate"])
    return model


def replay(model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]) -> PreTrainedModel:
    """Trains all parameters; one in twenty sequences comes from an earlier text."""
    needed = stage.steps * stage.batch_size
    old = stage.reference(round(REPLAYED_SHARE * needed))
    new = stage.sequences(stage.blocks, needed - len(old))
    train_stage(
        model, stage, hyperparameters["learning_rate"], concatenate_datasets([new, old]).shuffle(seed=stage.seed)
    )
    return model


def experts_only(model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]) -> PreTrainedModel:
    """Trains the expert tables, all rows of u and v, and nothing else."""
    model.requires_grad_(False)
    for table in expert_tables(model).values():
        table.requires_grad_(True)
    train_stage(model, stage, hyperparameters["learning_rate"])
    return model


def lora(model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]) -> nn.Module:
    """
    Trains an adapter of rank 16 on all linear layers, the same one in all stages. In PEER layers these are the query
    networks: expert tables are no linear layers.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if not isinstance(model, PeftModel):
        targets = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
        ]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    train_stage(model, stage, hyperparameters["learning_rate"])
    return model


def sparse_finetuning(model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]) -> PreTrainedModel:
    """
    Trains, in each layer, the t experts that a step uses most and earlier texts use least: their v alone, or u too.
    """
    background = ExpertBackground.measure(
        model, stage.reference(BACKGROUND_SEQUENCES * len(stage.earlier)), batch_size=16, progress_bar=False
    )
    tables = ("down_proj", "up_proj")[: int(hyperparameters.get("num_tables", 2))]
    callback = SparseFinetuningCallback(model, background, int(hyperparameters["num_trained_experts"]), tables)
    train_stage(model, stage, hyperparameters["learning_rate"], callbacks=[callback])
    return model


def grown_protected(model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]) -> PreTrainedModel:
    """Adds experts in protected mode for each text, with gates that distinguish it from the earlier texts."""
    return grow_gated(model, stage, hyperparameters, stage.reference(REFERENCE_SEQUENCES))


def grown_protected_generated(
    model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]
) -> PreTrainedModel:
    """
    Adds experts in protected mode for each text, with gates that distinguish it from text that the model has generated
    before. No earlier text is used.
    """
    length = len(stage.blocks[0]["input_ids"])
    generated = generate_text(model, REFERENCE_SEQUENCES, length, progress_bar=False)
    return grow_gated(model, stage, hyperparameters, generated)


def grow_gated(
    model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float], reference: Sequence[dict[str, Any]]
) -> PreTrainedModel:
    """Adds protected experts with gates that distinguish the text of a stage from a reference, and trains them."""
    add_experts(model, ADDED_SIDE**2)
    fit_gates(
        model,
        stage.sequences(stage.blocks, REFERENCE_SEQUENCES),
        reference,
        reference_weight=hyperparameters["reference_weight"],
        progress_bar=False,
    )
    train_stage(model, stage, hyperparameters["learning_rate"])
    return model


def grown_protected_ungated(
    model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]
) -> PreTrainedModel:
    """
    Adds experts in protected mode for each text, without fitting gates: there would be no other text to fit them to.
    Gates keep their initial value, 1 for every token, so that the added experts are used for all texts. No earlier
    text is used.
    """
    add_experts(model, ADDED_SIDE**2)
    train_stage(model, stage, hyperparameters["learning_rate"])
    return model


def grown_open(model: PreTrainedModel, stage: Stage, hyperparameters: dict[str, float]) -> PreTrainedModel:
    """Enlarges the key grid for each text; old experts and keys are frozen."""
    side = round(model.config.num_experts**0.5) + ADDED_ROWS * len(model.config.expert_additions or ())
    add_experts(model, (side + ADDED_ROWS) ** 2 - side**2, mode="open")
    train_stage(model, stage, hyperparameters["learning_rate"])
    return model


def with_rates(*rates: float, **hyperparameters: float) -> tuple[dict[str, float], ...]:
    """The same hyperparameters, once with each of the learning rates."""
    return tuple({"learning_rate": rate, **hyperparameters} for rate in rates)


@dataclass(frozen=True)
class Arm:
    """
    One way to teach a trained model a new text.

    Args:
        label (`str`): Label in tables and plots.
        learn (`Callable`): Function that teaches a stage to the model, see the docstring of this module.
        sweep (`tuple[dict]`): Hyperparameters to try.
        base (`str`, *optional*, defaults to `"peer"`): Model to start from, `"peer"` or its `"dense"` twin.
    """

    label: str
    learn: Callable[[nn.Module, Stage, dict[str, float]], nn.Module]
    sweep: tuple[dict[str, float], ...]
    base: str = "peer"


# Hyperparameters of arms whose gates are fitted.
GATED = (
    with_rates(1e-2, reference_weight=1)
    + with_rates(3e-3, 1e-2, reference_weight=4)
    + with_rates(3e-3, 1e-2, reference_weight=16)
)

ARMS = {
    "full": Arm("full finetuning", full_finetuning, with_rates(1e-4, 3e-4, 1e-3, 2e-3)),
    "lora": Arm("LoRA", lora, with_rates(1e-3, 3e-3, 1e-2)),
    "replay": Arm("replay 5 %", replay, with_rates(3e-4, 1e-3, 2e-3)),
    "experts": Arm("experts only", experts_only, with_rates(1e-3, 3e-3, 1e-2)),
    "sparse": Arm(
        "sparse finetuning",
        sparse_finetuning,
        with_rates(3e-3, 1e-2, num_trained_experts=1024)
        + with_rates(1e-2, 3e-2, num_trained_experts=256)
        + with_rates(1e-2, 3e-2, num_trained_experts=1024, num_tables=1),
    ),
    "protected": Arm("grown, protected", grown_protected, GATED),
    "protected-generated": Arm("grown, protected, generated text", grown_protected_generated, GATED),
    "protected-ungated": Arm("grown, protected, ungated", grown_protected_ungated, with_rates(1e-3, 3e-3, 1e-2)),
    "open": Arm("grown, open", grown_open, with_rates(3e-3, 1e-2, 3e-2)),
    "dense": Arm("dense twin, full finetuning", full_finetuning, with_rates(1e-4, 3e-4, 1e-3, 2e-3), base="dense"),
}
