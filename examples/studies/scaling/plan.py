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
"""The plan of the scaling study: which models, how large, trained for how long, and which of them are compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from common.model_arguments import ModelArguments, load_config
from modeling_peer import ModelCosts, PeerConfig, configuration_path, model_costs


# The base of the comparisons: the layer that this is about, and what it replaces.
PEER, DENSE = "peer", "dense"

# Groups of ablations, a table for each.
ABLATIONS = ("num_experts", "active", "query_norm", "variation")

# Fields that grow with `hidden_size`. In a plan they are those of the named configuration's size.
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "query_size")

# The held-out part of the training texts: by it rates and sizes are chosen.
CORPUS = "corpus"


@dataclass
class Plan:
    """
    What the study compares, read from a file: `configuration/scaling/`.

    Args:
        training_texts, evaluation_texts (`list[str]`): Names in corpora.py or ids of the Hub. Of the first, texts are held
            out; the second are from other sources.
        block_size, batch_size (`int`): Tokens of a sequence, sequences of a step.
        budgets (`list[float]`): Training FLOPs of a model, rising.
        hidden_sizes (`list[list[int]]`): Sizes to sweep at each budget, rising; widths of feed-forwards and the number of
            heads grow with them.
        learning_rates (`list[float]`): Of which each variant takes its best.
        seeds (`int`): Seeds that figures are means over. Rates and sizes are chosen with one more.
        eval_sequences (`int`): Sequences of each held-out text.
        training (`dict`): Further `TrainingArguments` of every run, in which `gradient_accumulation_steps` divides the
            `batch_size`.
        fields (`dict`): In which all models differ from the named configurations.
        variants (`dict[str, dict]`): Of each, the named `configuration` it is made of, its own `training` arguments, and
            fields that differ.
        reference_hidden_size (`int`): The size at which learning rates are chosen and ablations are made, the latter for
            as many steps as the last budget pays for.
        ablations (`dict[str, dict[str, dict]]`): In the groups of `ABLATIONS`, fields and `training` arguments in which
            models differ from the PEER variant.
        repeated_ablations (`list[str]`): Groups of them that are made with every seed, the others with one.
        after_training (`dict[str, dict]`): Fields to change in the trained PEER model at that size, without training again.
    """

    training_texts: list[str]
    evaluation_texts: list[str]
    block_size: int
    batch_size: int
    budgets: list[float]
    hidden_sizes: list[list[int]]
    learning_rates: list[float]
    seeds: int
    eval_sequences: int
    training: dict[str, Any]
    fields: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    reference_hidden_size: int
    ablations: dict[str, dict[str, dict[str, Any]]]
    repeated_ablations: list[str]
    after_training: dict[str, dict[str, Any]]

    def __post_init__(self):
        for name in (PEER, DENSE):
            if name not in self.variants:
                raise ValueError(
                    f"`variants` must have {name!r}, the comparison's two ends, got {list(self.variants)}."
                )
        for name in ("ablations", "repeated_ablations"):
            for group in getattr(self, name):
                if group not in ABLATIONS:
                    raise ValueError(f"`{name}` are of the groups {list(ABLATIONS)}, got {group!r}.")
        for name in ("training_texts", "evaluation_texts", "hidden_sizes", "budgets", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must name at least one.")
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1, got {self.seeds}.")
        for name, values in (("budgets", self.budgets), *(("hidden_sizes", sizes) for sizes in self.hidden_sizes)):
            if not values or values != sorted(set(values)):
                raise ValueError(f"`{name}` must rise, with one at least, got {values}.")
        if len(self.hidden_sizes) != len(self.budgets):
            raise ValueError(
                f"`hidden_sizes` must be as many lists as `budgets`, {len(self.budgets)}, got {len(self.hidden_sizes)}."
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"`batch_size` must be a multiple of `gradient_accumulation_steps` = {self.accumulation_steps}, got "
                f"{self.batch_size}."
            )

    @property
    def tokens_of_step(self) -> int:
        return self.block_size * self.batch_size

    def sizes(self, budget: float) -> list[int]:
        """Those to sweep at a budget."""
        return self.hidden_sizes[self.budgets.index(budget)]

    @property
    def all_sizes(self) -> list[int]:
        """Those of all budgets, rising."""
        return sorted({size for sizes in self.hidden_sizes for size in sizes})

    @property
    def accumulation_steps(self) -> int:
        """Forwards of a step, each of as many of its sequences."""
        return self.training.get("gradient_accumulation_steps", 1)


@dataclass(frozen=True)
class Run:
    """A model to train. `ablation` is a group and a name in it, of the plan's."""

    variant: str
    hidden_size: int
    steps: int
    learning_rate: float
    seed: int = 0
    ablation: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        ablation = "" if self.ablation is None else f"{self.ablation[0]}={self.ablation[1]}-".replace(" ", "_")
        return (
            f"{self.variant}-{ablation}hidden_size={self.hidden_size}-steps={self.steps}"
            f"-learning_rate={self.learning_rate:g}-seed={self.seed}"
        )


def budget_name(budget: float) -> str:
    """`"8e12"`."""
    return f"{budget:g}".replace("e+", "e")


def read_plan(file: Path) -> Plan:
    """The plan in a JSON file."""
    (plan,) = HfArgumentParser((Plan,)).parse_json_file(str(file))
    return plan


def _ablation(run: Run, plan: Plan) -> dict[str, Any]:
    return {} if run.ablation is None else plan.ablations[run.ablation[0]][run.ablation[1]]


def training_arguments(run: Run, plan: Plan) -> dict[str, Any]:
    """The plan's `TrainingArguments` for a run: of all runs, its variant's, its ablation's."""
    own = (plan.variants[run.variant], _ablation(run, plan))
    return plan.training | {name: value for each in own for name, value in each.get("training", {}).items()}


def base_configuration(run: Run, plan: Plan) -> str:
    """The name of the configuration that the model is made of."""
    return plan.variants[run.variant]["configuration"]


def changed_fields(run: Run, plan: Plan) -> dict[str, Any]:
    """
    In what the model's configuration differs from that: size, variant, ablation. Raises `ValueError` for a size that heads
    of the configuration's size do not make up.
    """
    base = PeerConfig.from_pretrained(configuration_path(base_configuration(run, plan)))
    fields = {
        "head_dim": base.head_dim,
        **plan.fields,
        **plan.variants[run.variant],
        **_ablation(run, plan),
    }
    heads, rest = divmod(run.hidden_size, fields["head_dim"])
    if rest:
        raise ValueError(
            f"`hidden_sizes` must be multiples of the head size {fields['head_dim']} of {run.variant}, got "
            f"{run.hidden_size}."
        )
    for name in ("configuration", "training"):
        fields.pop(name, None)
    widths = {name: fields.get(name, getattr(base, name)) for name in WIDTHS}
    return {
        **fields,
        **{name: width * run.hidden_size // base.hidden_size for name, width in widths.items() if width is not None},
        "hidden_size": run.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,  # a share of them need not be a number
    }


def configuration_of(run: Run, plan: Plan) -> PeerConfig:
    """The model's configuration, as run_clm.py makes it."""
    return load_config(ModelArguments(config_name=base_configuration(run, plan)), **changed_fields(run, plan))


def costs_of(run: Run, plan: Plan) -> ModelCosts:
    """What the model costs, at the length it is trained at."""
    return model_costs(configuration_of(run, plan), plan.block_size)


def training_flops(run: Run, plan: Plan) -> int:
    """Forward and backward of all steps."""
    return 3 * costs_of(run, plan).flops * run.steps * plan.tokens_of_step


def run_of_budget(variant: str, hidden_size: int, budget: float, learning_rate: float, plan: Plan) -> Run:
    """The run of as many steps as the budget pays for. Raises `ValueError` if that is none."""
    step = Run(variant, hidden_size, 1, learning_rate)
    return _of_steps(step, budget / training_flops(step, plan))


def _of_steps(run, steps):
    if steps < 0.5:
        raise ValueError(
            f"{run.variant} of hidden_size {run.hidden_size} must be trained for a step at least, got {steps:.2g}: raise "
            "`budgets`."
        )
    return replace(run, steps=round(steps))


def run_of_seconds(run: Run, other: Run, step_seconds: Callable[[Run], float]) -> Run:
    """The run, for as many steps as take the seconds of the other."""
    return _of_steps(run, other.steps * step_seconds(other) / step_seconds(run))


def rate_runs(plan: Plan) -> list[Run]:
    """Every variant at every learning rate, at the reference size and the first budget."""
    return [
        run_of_budget(variant, plan.reference_hidden_size, plan.budgets[0], rate, plan)
        for variant in plan.variants
        for rate in plan.learning_rates
    ]


def choose_rates(plan: Plan, results: dict[str, dict]) -> dict[str, float]:
    """The rate of each variant at which the held-out part of the training texts had the lowest loss."""
    runs = rate_runs(plan)
    return {
        variant: min(
            (run for run in runs if run.variant == variant), key=lambda run: corpus_loss(results[run.name])
        ).learning_rate
        for variant in plan.variants
    }


def size_runs(plan: Plan, rates: dict[str, float], budget: float) -> list[Run]:
    """Every variant at every size, trained for one budget."""
    return [
        run_of_budget(variant, hidden_size, budget, rates[variant], plan)
        for hidden_size in plan.sizes(budget)
        for variant in plan.variants
    ]


def choose_sizes(plan: Plan, rates: dict[str, float], budget: float, results: dict[str, dict]) -> dict[str, Run]:
    """The compute-optimal run of each variant, by the held-out part of the training texts."""
    runs = size_runs(plan, rates, budget)
    return {
        variant: min((run for run in runs if run.variant == variant), key=lambda run: corpus_loss(results[run.name]))
        for variant in plan.variants
    }


def reference_run(plan: Plan, rates: dict[str, float]) -> Run:
    """The run that ablations are held against."""
    return run_of_budget(PEER, plan.reference_hidden_size, plan.budgets[-1], rates[PEER], plan)


def ablation_runs(plan: Plan, rates: dict[str, float]) -> list[Run]:
    """All ablations, with the first seed, trained for as many steps as the run they are held against."""
    reference = reference_run(plan, rates)
    return [
        replace(reference, ablation=(group, name)) for group, members in plan.ablations.items() for name in members
    ]


def with_seeds(run: Run, plan: Plan) -> list[Run]:
    """
    The run with every seed that its figures are of. Where the choice is by the loss with the first seed, of sizes and rates,
    that is another seed: what is chosen was lucky with it. Ablations are not chosen.
    """
    first = 1 if run.ablation is None else 0
    return [replace(run, seed=first + i) for i in range(plan.seeds)]


def repeated_ablation_runs(plan: Plan, rates: dict[str, float]) -> list[Run]:
    """All ablations, those of `plan.repeated_ablations` with every seed."""
    found = []
    for run in ablation_runs(plan, rates):
        found += with_seeds(run, plan) if run.ablation[0] in plan.repeated_ablations else [run]
    return found


def corpus_loss(result: dict[str, Any]) -> float:
    return result["losses"][CORPUS]
