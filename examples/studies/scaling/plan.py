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
"""The plan of the scaling study: which models are trained, at which sizes, for how long, and which are compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from common.model_arguments import ModelArguments, load_config
from modeling_peer import ModelCosts, PeerConfig, configuration_path, model_costs


# Variants that every plan has: the layer of interest, and the layer that it replaces.
PEER, DENSE = "peer", "dense"

# Groups of ablations, with one table each.
ABLATIONS = ("num_experts", "active", "query_norm", "variation")

# Fields that scale with `hidden_size`. In a plan they hold for the `hidden_size` of the named configuration.
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "query_size")

# Name of the held-out part of the training texts, by which learning rates and sizes are chosen.
CORPUS = "corpus"


@dataclass
class Plan:
    """
    What the study compares. It is read from a JSON file, such as `plans/two-cores.json`.

    Args:
        training_texts, evaluation_texts (`list[str]`):
            Texts by their names in studies/common/corpora.py or ids of the Hub. A part of the training texts is held
            out; the evaluation texts come from other sources.
        block_size, batch_size (`int`): Tokens per sequence, and sequences per step.
        budgets (`list[float]`): Training FLOPs of a model, in ascending order.
        hidden_sizes (`list[list[int]]`):
            Sizes to sweep at each budget, in ascending order. Widths of feed-forwards and the number of heads scale
            with them.
        learning_rates (`list[float]`): Learning rates to sweep; each variant uses its best one.
        seeds (`int`):
            Number of seeds that figures are means over. Learning rates and sizes are chosen with one more seed.
        eval_sequences (`int`): Sequences per held-out text.
        training (`dict`):
            Further `TrainingArguments` of every run. Its `gradient_accumulation_steps` must divide the `batch_size`.
        fields (`dict`): Fields in which all models differ from the named configurations.
        variants (`dict[str, dict]`):
            For each variant its named `configuration`, its own `training` arguments, and the fields that differ.
        reference_hidden_size (`int`):
            Size at which learning rates are chosen and ablations are made, the latter for the steps of the last
            budget.
        ablations (`dict[str, dict[str, dict]]`):
            For each group of `ABLATIONS`, fields and `training` arguments in which models differ from the PEER
            variant.
        repeated_ablations (`list[str]`):
            Groups of ablations that are made with every seed. The others are made with one.
        after_training (`dict[str, dict]`):
            Fields to change in the trained PEER model of the reference size, without training it again.
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
                    f"`variants` must contain {PEER!r} and {DENSE!r}, which are compared, but got "
                    f"{list(self.variants)}."
                )
        for name in ("ablations", "repeated_ablations"):
            for group in getattr(self, name):
                if group not in ABLATIONS:
                    raise ValueError(f"The groups in `{name}` must be some of {list(ABLATIONS)}, but got {group!r}.")
        for name in ("training_texts", "evaluation_texts", "hidden_sizes", "budgets", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must have at least one element.")
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1, but got {self.seeds}.")
        for name, values in (("budgets", self.budgets), *(("hidden_sizes", sizes) for sizes in self.hidden_sizes)):
            if not values or values != sorted(set(values)):
                raise ValueError(f"`{name}` must be non-empty and strictly ascending, but got {values}.")
        if len(self.hidden_sizes) != len(self.budgets):
            raise ValueError(
                f"`hidden_sizes` must have one list per budget, {len(self.budgets)}, but got {len(self.hidden_sizes)}."
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"`batch_size` must be a multiple of `gradient_accumulation_steps` = {self.accumulation_steps}, but "
                f"got {self.batch_size}."
            )

    @property
    def tokens_of_step(self) -> int:
        """Tokens per training step."""
        return self.block_size * self.batch_size

    def sizes(self, budget: float) -> list[int]:
        """Sizes to sweep at a budget."""
        return self.hidden_sizes[self.budgets.index(budget)]

    @property
    def all_sizes(self) -> list[int]:
        """Sizes of all budgets, in ascending order."""
        return sorted({size for sizes in self.hidden_sizes for size in sizes})

    @property
    def accumulation_steps(self) -> int:
        """Number of forwards per training step."""
        return self.training.get("gradient_accumulation_steps", 1)


@dataclass(frozen=True)
class Run:
    """A model to train. `ablation` is a group of ablations of the plan and a name in it."""

    variant: str
    hidden_size: int
    steps: int
    learning_rate: float
    seed: int = 0
    ablation: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """A name that tells the run from all others, for its files."""
        ablation = "" if self.ablation is None else f"{self.ablation[0]}={self.ablation[1]}-".replace(" ", "_")
        return (
            f"{self.variant}-{ablation}hidden_size={self.hidden_size}-steps={self.steps}"
            f"-learning_rate={self.learning_rate:g}-seed={self.seed}"
        )


def budget_name(budget: float) -> str:
    """The budget in short form, such as `"8e12"`."""
    return f"{budget:g}".replace("e+", "e")


def read_plan(file: Path) -> Plan:
    """Reads the plan in a JSON file."""
    (plan,) = HfArgumentParser((Plan,)).parse_json_file(str(file))
    return plan


def _ablation(run: Run, plan: Plan) -> dict[str, Any]:
    return {} if run.ablation is None else plan.ablations[run.ablation[0]][run.ablation[1]]


def training_arguments(run: Run, plan: Plan) -> dict[str, Any]:
    """The `TrainingArguments` of a run: those of all runs, of its variant and of its ablation."""
    own = (plan.variants[run.variant], _ablation(run, plan))
    return plan.training | {name: value for each in own for name, value in each.get("training", {}).items()}


def base_configuration(run: Run, plan: Plan) -> str:
    """The named configuration of the variant of a run."""
    return plan.variants[run.variant]["configuration"]


def changed_fields(run: Run, plan: Plan) -> dict[str, Any]:
    """
    The fields in which the configuration of a run differs from the named one: those of its size, variant and ablation.

    Raises:
        `ValueError`: if the size is not a multiple of the head size.
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
            f"`hidden_sizes` must be multiples of the head size {fields['head_dim']} of {run.variant}, but got "
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
        "num_key_value_heads": heads,  # a fraction of the heads need not be a whole number
    }


def trains_by_rows(run: Run, plan: Plan) -> bool:
    """
    Whether [`RowAdamW`] trains a run. Plans say it by `sparse_expert_gradients`, once a field of configurations.
    """
    return changed_fields(run, plan).get("sparse_expert_gradients", False)


def configuration_of(run: Run, plan: Plan) -> PeerConfig:
    """The configuration of the model of a run, as run_clm.py makes it."""
    return load_config(ModelArguments(config_name=base_configuration(run, plan)), **changed_fields(run, plan))


def costs_of(run: Run, plan: Plan) -> ModelCosts:
    """The costs of the model of a run, at the sequence length of its training."""
    return model_costs(configuration_of(run, plan), plan.block_size)


def training_flops(run: Run, plan: Plan) -> int:
    """FLOPs of forward and backward of all training steps."""
    return 3 * costs_of(run, plan).flops * run.steps * plan.tokens_of_step


def run_of_budget(variant: str, hidden_size: int, budget: float, learning_rate: float, plan: Plan) -> Run:
    """The run of as many steps as fit into a budget. Raises `ValueError` if not even one does."""
    step = Run(variant, hidden_size, 1, learning_rate)
    return _of_steps(step, budget / training_flops(step, plan))


def _of_steps(run, steps):
    if steps < 0.5:
        raise ValueError(
            f"{run.variant} of hidden_size {run.hidden_size} must be trained for at least one step, but got "
            f"{steps:.2g}: raise `budgets`."
        )
    return replace(run, steps=round(steps))


def run_of_seconds(run: Run, other: Run, step_seconds: Callable[[Run], float]) -> Run:
    """The run with as many steps as take the seconds of another run."""
    return _of_steps(run, other.steps * step_seconds(other) / step_seconds(run))


def rate_runs(plan: Plan) -> list[Run]:
    """Runs of every variant with every learning rate, at the reference size and the first budget."""
    return [
        run_of_budget(variant, plan.reference_hidden_size, plan.budgets[0], rate, plan)
        for variant in plan.variants
        for rate in plan.learning_rates
    ]


def choose_rates(plan: Plan, results: dict[str, dict]) -> dict[str, float]:
    """The learning rate of each variant with the lowest loss on the held-out part of the training texts."""
    runs = rate_runs(plan)
    return {
        variant: min(
            (run for run in runs if run.variant == variant), key=lambda run: corpus_loss(results[run.name])
        ).learning_rate
        for variant in plan.variants
    }


def size_runs(plan: Plan, rates: dict[str, float], budget: float) -> list[Run]:
    """Runs of every variant at every size of a budget."""
    return [
        run_of_budget(variant, hidden_size, budget, rates[variant], plan)
        for hidden_size in plan.sizes(budget)
        for variant in plan.variants
    ]


def choose_sizes(plan: Plan, rates: dict[str, float], budget: float, results: dict[str, dict]) -> dict[str, Run]:
    """The compute-optimal run of each variant, chosen by the loss on the held-out part of the training texts."""
    runs = size_runs(plan, rates, budget)
    return {
        variant: min((run for run in runs if run.variant == variant), key=lambda run: corpus_loss(results[run.name]))
        for variant in plan.variants
    }


def reference_run(plan: Plan, rates: dict[str, float]) -> Run:
    """The run that ablations are compared with."""
    return run_of_budget(PEER, plan.reference_hidden_size, plan.budgets[-1], rates[PEER], plan)


def ablation_runs(plan: Plan, rates: dict[str, float]) -> list[Run]:
    """Runs of all ablations with the first seed, for as many steps as the reference run."""
    reference = reference_run(plan, rates)
    return [
        replace(reference, ablation=(group, name)) for group, members in plan.ablations.items() for name in members
    ]


def with_seeds(run: Run, plan: Plan) -> list[Run]:
    """
    The run with every seed that its figures are means over.

    Sizes and learning rates are chosen by the loss with the first seed, so the choice is biased towards runs that were
    lucky with it: their figures come from other seeds. Ablations are not chosen and keep the first seed.
    """
    first = 1 if run.ablation is None else 0
    return [replace(run, seed=first + i) for i in range(plan.seeds)]


def repeated_ablation_runs(plan: Plan, rates: dict[str, float]) -> list[Run]:
    """Runs of all ablations, those of `plan.repeated_ablations` with every seed."""
    found = []
    for run in ablation_runs(plan, rates):
        found += with_seeds(run, plan) if run.ablation[0] in plan.repeated_ablations else [run]
    return found


def corpus_loss(result: dict[str, Any]) -> float:
    """Loss on the held-out part of the training texts."""
    return result["losses"][CORPUS]
