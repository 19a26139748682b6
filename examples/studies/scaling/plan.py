# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan of the scaling study: which models are trained, at which sizes, for how long, and which are compared."""

from dataclasses import dataclass, replace
from typing import Any

from studies.common.training_plan import PEER, Run, TrainingPlan, corpus_loss, merge_changes, run_of_budget


@dataclass
class Plan(TrainingPlan):
    """
    What the study compares. It is read from a JSON file, such as `plans/two-cores.json`.

    Args:
        training_texts, evaluation_texts, block_size, batch_size, eval_sequences, training, fields, variants:
            See [`TrainingPlan`].
        budgets (`list[float]`): Training FLOPs of a model, in ascending order.
        hidden_sizes (`list[list[int]]`):
            Sizes to sweep at each budget, in ascending order. Widths of feed-forwards and the number of heads scale
            with them.
        learning_rates (`list[float]`): Learning rates to sweep; each variant uses its best one.
        seeds (`int`):
            Number of seeds that figures are means over. Learning rates and sizes are chosen with one more seed.
        reference_hidden_size (`int`):
            Size at which learning rates are chosen and ablations are made, the latter for the steps of the last
            budget.
        ablations (`dict[str, dict[str, dict]]`):
            For each group (`"num_experts"`, `"active"`, `"query_norm"` or `"variation"`), the fields and `training`
            arguments in which models differ from the PEER variant.
        repeated_ablations (`list[str]`):
            Groups of ablations that are made with every seed. The others are made with one.
        after_training (`dict[str, dict]`):
            Fields to change in the trained PEER model of the reference size, without training it again.
    """

    budgets: list[float]
    hidden_sizes: list[list[int]]
    learning_rates: list[float]
    seeds: int
    reference_hidden_size: int
    ablations: dict[str, dict[str, dict[str, Any]]]
    repeated_ablations: list[str]
    after_training: dict[str, dict[str, Any]]

    def own_changes(self, run: Run) -> dict[str, Any]:
        """The changes of a run: those of its variant and of its ablation."""
        ablation = {} if run.ablation is None else self.ablations[run.ablation[0]][run.ablation[1]]
        return merge_changes(super().own_changes(run), ablation)

    def sizes(self, budget: float) -> list[int]:
        """Sizes to sweep at a budget."""
        return self.hidden_sizes[self.budgets.index(budget)]

    @property
    def all_sizes(self) -> list[int]:
        """Sizes of all budgets, in ascending order."""
        return sorted({size for sizes in self.hidden_sizes for size in sizes})


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

    Sizes and learning rates are chosen by the loss with the first seed, so the choice is biased toward runs that were
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
