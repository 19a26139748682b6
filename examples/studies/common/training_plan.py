# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Code of all studies that train many models: which model a run trains, for how long, and what that costs."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.model_arguments import ModelArguments, load_config
from modeling_peer import ModelCosts, PeerConfig, configuration_path, model_costs
from studies.common.study_folder import read_json


# Variants that every plan has: the layer of interest, and the layer that it replaces.
PEER, DENSE = "peer", "dense"

# Fields that scale with `hidden_size`. In a plan they hold for the `hidden_size` of the named configuration.
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "query_size")

# Name of the held-out part of the training texts, by which learning rates and sizes are chosen.
CORPUS = "corpus"


@dataclass
class TrainingPlan:
    """
    What all runs of a study share, and the models that they may train.

    Args:
        training_texts, evaluation_texts (`list[str]`):
            Texts by their names in studies/common/corpora.py or ids of the Hub. A part of the training texts is held
            out; the evaluation texts come from other sources.
        block_size, batch_size (`int`): Tokens per sequence, and sequences per step.
        eval_sequences (`int`): Sequences per held-out text.
        training (`dict`):
            Further `TrainingArguments` of every run.
        fields (`dict`): Fields in which all models differ from the named configurations.
        variants (`dict[str, dict]`):
            For each variant its named `configuration`, its own `training` arguments, and the fields that differ.
    """

    training_texts: list[str]
    evaluation_texts: list[str]
    block_size: int
    batch_size: int
    eval_sequences: int
    training: dict[str, Any]
    fields: dict[str, Any]
    variants: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: Path) -> "TrainingPlan":
        """Reads the plan in a JSON file."""
        return cls(**read_json(file))

    @property
    def tokens_of_step(self) -> int:
        """Tokens per training step."""
        return self.block_size * self.batch_size

    def own_changes(self, run: "Run") -> dict[str, Any]:
        """Settings of a run that not all runs share: its named `configuration`, `training` arguments, and fields."""
        return self.variants[run.variant]


def merge_changes(*changes: dict[str, Any]) -> dict[str, Any]:
    """Merge several changes into one; later ones take precedence."""
    merged: dict[str, Any] = {}
    for each in changes:
        merged |= each | {"training": merged.get("training", {}) | each.get("training", {})}
    return merged


@dataclass(frozen=True)
class Run:
    """A model to train. `ablation` names a group of changes in the plan, and one of the changes in this group."""

    variant: str
    hidden_size: int
    steps: int
    learning_rate: float
    seed: int = 0
    ablation: tuple[str, str] | None = None

    @property
    def model(self) -> str:
        """A name of the model without its size: its variant and its ablation."""
        return self.variant if self.ablation is None else f"{self.variant}-{'='.join(self.ablation)}".replace(" ", "_")

    @property
    def name(self) -> str:
        """The unique name of the run, for its files."""
        return (
            f"{self.model}-hidden_size={self.hidden_size}-steps={self.steps}"
            f"-learning_rate={self.learning_rate:g}-seed={self.seed}"
        )


def budget_name(budget: float) -> str:
    """The budget in short form, such as `"8e12"`."""
    return f"{budget:g}".replace("e+", "e")


def training_arguments(run: Run, plan: TrainingPlan) -> dict[str, Any]:
    """The `TrainingArguments` of a run: those of all runs, and its own."""
    return plan.training | plan.own_changes(run).get("training", {})


def base_configuration(run: Run, plan: TrainingPlan) -> str:
    """The named configuration of the variant of a run."""
    return plan.own_changes(run)["configuration"]


@functools.cache
def named_configuration(name: str) -> PeerConfig:
    """A named configuration. It is cached, as plans ask for it with every run."""
    return PeerConfig.from_pretrained(configuration_path(name))


def changed_fields(run: Run, plan: TrainingPlan) -> dict[str, Any]:
    """The fields in which the configuration of a run differs from the named one: those of its size and its own."""
    base = named_configuration(base_configuration(run, plan))
    fields = {"head_dim": base.head_dim, **plan.fields, **plan.own_changes(run)}
    heads = run.hidden_size // fields["head_dim"]
    for name in ("configuration", "training"):
        fields.pop(name, None)
    widths = {name: fields.get(name, getattr(base, name)) for name in WIDTHS}
    return {
        **fields,
        **{name: width * run.hidden_size // base.hidden_size for name, width in widths.items() if width is not None},
        "hidden_size": run.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,  # a fraction of the heads need not be a whole number
    }


def trains_by_rows(run: Run, plan: TrainingPlan) -> bool:
    """
    Whether [`RowAdamW`] trains a run. Plans say so by `sparse_expert_gradients`, a field of former configurations.
    """
    return changed_fields(run, plan).get("sparse_expert_gradients", False)


def configuration_of(run: Run, plan: TrainingPlan) -> PeerConfig:
    """The configuration of the model of a run, as run_clm.py makes it."""
    return load_config(ModelArguments(config_name=base_configuration(run, plan)), **changed_fields(run, plan))


def costs_of(run: Run, plan: TrainingPlan) -> ModelCosts:
    """The costs of the model of a run, at the sequence length of its training."""
    fields = json.dumps(changed_fields(run, plan), sort_keys=True)
    return _costs_of_model(base_configuration(run, plan), fields, plan.block_size)


@functools.cache
def _costs_of_model(name, fields, block_size):
    """Cached costs: runs that differ only in steps, rate or seed have the same model."""
    return model_costs(load_config(ModelArguments(config_name=name), **json.loads(fields)), block_size)


def training_flops(run: Run, plan: TrainingPlan) -> int:
    """FLOPs of forward and backward of all training steps."""
    return 3 * costs_of(run, plan).flops * run.steps * plan.tokens_of_step


def run_of_budget(
    variant: str,
    hidden_size: int,
    budget: float,
    learning_rate: float,
    plan: TrainingPlan,
    ablation: tuple[str, str] | None = None,
) -> Run:
    """The run with as many steps, rounded, as a budget pays for. Raises `ValueError` for less than half a step."""
    step = Run(variant, hidden_size, 1, learning_rate, ablation=ablation)
    return run_of_steps(step, budget / training_flops(step, plan))


def run_of_steps(run: Run, steps: float) -> Run:
    """The run with another number of steps, rounded. Raises `ValueError` for less than half a step."""
    if round(steps) < 1:
        raise ValueError(
            f"{run.variant} of hidden_size {run.hidden_size} must be trained for at least one step, but got "
            f"{steps:.2g}: raise `budgets`."
        )
    return replace(run, steps=round(steps))


def run_of_seconds(run: Run, other: Run, step_seconds: Callable[[Run], float]) -> Run:
    """The run with as many steps as another run's seconds allow."""
    return run_of_steps(run, other.steps * step_seconds(other) / step_seconds(run))


def corpus_loss(result: dict[str, Any]) -> float:
    """Loss on the held-out part of the training texts, infinite if the run diverged: NaN is not less than anything."""
    loss = result["losses"][CORPUS]
    return math.inf if math.isnan(loss) else loss
