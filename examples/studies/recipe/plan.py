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
"""The plan of the recipe study: what is searched, tuned and compared, and which runs that takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from studies.common.training_plan import (
    DENSE,
    PEER,
    Run,
    TrainingPlan,
    changed_fields,
    corpus_loss,
    merge_changes,
    run_of_budget,
    run_of_seconds,
    run_of_steps,
)


# The variant that the search ends with.
RECIPE = "recipe"

# Groups of changes of a variant, see `Run.ablation`: the trial of the tuning, and the number of experts.
TUNING, NUM_EXPERTS = "tuning", "num_experts"


@dataclass
class RecipePlan(TrainingPlan):
    """
    What the study compares. It is read from a JSON file, such as `plans/two-cores.json`. A variant may have a
    `parent`, another variant of which it has everything that it does not change, and a `trial`: what no flag of
    run_clm.py gives, see trials.py.

    Args:
        training_texts, evaluation_texts, block_size, batch_size, eval_sequences, training, fields, variants:
            See [`TrainingPlan`].
        budgets (`list[float]`): Training FLOPs of a model, in ascending order. Search and tuning are at the first.
        hidden_size (`int`): Size of the models of search and tuning.
        learning_rate (`float`): Learning rate of the search.
        search_seeds (`int`): Number of seeds of the search. A variant and its parent are paired by them.
        searched (`list[str]`): Variants that are compared with their parents.
        trials (`dict[str, list[dict]]`):
            For each variant that is compared, learning rates and further changes to choose from: equally many. At
            another size the learning rate is divided by what the size is multiplied by.
        hidden_sizes (`dict[str, list[list[int]]]`): For each variant and budget, sizes to choose from.
        seeds (`dict[str, list[int]]`): For each variant and budget, the number of seeds that figures are means over.
        dense_sizes (`list[int]`): Sizes of dense models that are trained on as many tokens as the recipe.
        nums_experts (`list[int]`): Numbers of experts that the recipe is tried with.
        ingredients (`list[str]`): Variants that lack one ingredient of the recipe each.
    """

    budgets: list[float]
    hidden_size: int
    learning_rate: float
    search_seeds: int
    searched: list[str]
    trials: dict[str, list[dict[str, Any]]]
    hidden_sizes: dict[str, list[list[int]]]
    seeds: dict[str, list[int]]
    dense_sizes: list[int]
    nums_experts: list[int]
    ingredients: list[str]

    def __post_init__(self):
        super().__post_init__()
        for name in self.variants:
            self.lineage(name)
        for field in ("searched", "trials", "seeds", "hidden_sizes", "ingredients"):
            if unknown := set(getattr(self, field)) - self.variants.keys():
                raise ValueError(f"`{field}` must name some of `variants`, but got {sorted(unknown)} among them.")
        for name in self.searched:
            if "parent" not in self.variants[name]:
                raise ValueError(f"`searched` must name variants that have a `parent`, but {name!r} has none.")
        numbers = {variant: len(trials) for variant, trials in self.trials.items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"`trials` must be equally many for all variants, but there are {numbers}.")
        for field in ("seeds", "hidden_sizes"):
            for name, values in getattr(self, field).items():
                if len(values) != len(self.budgets):
                    raise ValueError(
                        f"`{field}` of {name!r} must have one entry per budget, {len(self.budgets)}, but got {values}."
                    )

    def lineage(self, variant: str) -> list[dict[str, Any]]:
        """What each of the parents of a variant has, the first of them first, and the variant itself."""
        names, name = [], variant
        while name is not None:
            if name not in self.variants or name in names:
                raise ValueError(f"The parents of {variant!r} must be other `variants`, but got {[*names[1:], name]}.")
            names.insert(0, name)
            name = self.variants[name].get("parent")
        return [self.variants[name] for name in names]

    def own_changes(self, run: Run) -> dict[str, Any]:
        """What its variant and its parents have, and what is tuned."""
        changes = merge_changes(*self.lineage(run.variant), self._tuned(run))
        return {name: value for name, value in changes.items() if name not in ("parent", "trial", "learning_rate")}

    def _tuned(self, run):
        if run.ablation is None:
            return {}
        trials = self.trials[RECIPE if run.variant in self.ingredients else run.variant]
        trial, _, num_experts = run.ablation[1].partition(", ")
        return trials[int(trial)] | ({"num_experts": int(num_experts)} if num_experts else {})

    def trial_of(self, run: Run) -> dict[str, Any]:
        """What is tried in the training of a run that no flag gives."""
        return {name: value for each in self.lineage(run.variant) for name, value in each.get("trial", {}).items()}


def read_plan(file: Path) -> RecipePlan:
    """Reads the plan in a JSON file."""
    (plan,) = HfArgumentParser((RecipePlan,)).parse_json_file(str(file))
    return plan


def with_seeds(runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
    """Each of the runs with each of the seeds."""
    return [replace(run, seed=seed) for run in runs for seed in seeds]


def search_runs(plan: RecipePlan) -> dict[str, list[Run]]:
    """The runs of the search by variant: those that are searched, their parents, and dense."""
    parents = [plan.variants[name]["parent"] for name in plan.searched]
    return {
        name: with_seeds(
            [run_of_budget(name, plan.hidden_size, plan.budgets[0], plan.learning_rate, plan)],
            range(plan.search_seeds),
        )
        for name in dict.fromkeys([DENSE, PEER, *parents, *plan.searched])
    }


def tuning_runs(plan: RecipePlan) -> dict[str, list[Run]]:
    """The runs of the tuning by variant, one for each trial, with the first seed."""
    return {
        variant: [
            run_of_budget(
                variant, plan.hidden_size, plan.budgets[0], trial["learning_rate"], plan, (TUNING, str(index))
            )
            for index, trial in enumerate(trials)
        ]
        for variant, trials in plan.trials.items()
    }


def tuned(plan: RecipePlan, results: dict[str, dict]) -> dict[str, Run]:
    """The run of each variant whose trial has the lowest loss on the held-out part of the training texts."""
    return {
        variant: min(runs, key=lambda run: corpus_loss(results[run.name]))
        for variant, runs in tuning_runs(plan).items()
    }


def run_of_size(best: Run, hidden_size: int, budget: float, plan: RecipePlan) -> Run:
    """A run of another size with the trial that a variant was tuned to, and its learning rate by the rule."""
    rate = float(f"{best.learning_rate * best.hidden_size / hidden_size:.3g}")
    return run_of_budget(best.variant, hidden_size, budget, rate, plan, best.ablation)


def size_runs(plan: RecipePlan, best: Run, budget: float) -> list[Run]:
    """The runs of a variant at each size of a budget, with the first seed."""
    return [
        run_of_size(best, size, budget, plan) for size in plan.hidden_sizes[best.variant][plan.budgets.index(budget)]
    ]


def choose_size(runs: list[Run], results: dict[str, dict]) -> Run:
    """The run with the lowest loss on the held-out part of the training texts."""
    return min(runs, key=lambda run: corpus_loss(results[run.name]))


def compared_runs(plan: RecipePlan, chosen: Run, budget: float) -> list[Run]:
    """The run of the size that was chosen, with seeds that nothing was chosen with."""
    number = plan.seeds[chosen.variant][plan.budgets.index(budget)]
    return with_seeds([chosen], range(plan.search_seeds, plan.search_seeds + number))


def seconds_runs(
    plan: RecipePlan, best: dict[str, Run], dense: Run, budget: float, step_seconds: Callable[[Run], float]
) -> dict[str, list[Run]]:
    """Dense and the recipe at each size of a budget, for as many steps as take the seconds of a dense run."""
    return {
        variant: [run_of_seconds(run, dense, step_seconds) for run in size_runs(plan, best[variant], budget)]
        for variant in (DENSE, RECIPE)
    }


def ingredient_runs(plan: RecipePlan, best: Run) -> dict[str, list[Run]]:
    """
    The recipe, and without each of its ingredients, at the rate of the recipe, the first budget and the seeds of the
    comparison. Raises `ValueError` if what remains is the recipe itself.
    """
    rate, seeds = best.learning_rate, _seeds_of_the_comparison(plan)
    runs = {
        name: with_seeds([run_of_budget(name, plan.hidden_size, plan.budgets[0], rate, plan, best.ablation)], seeds)
        for name in [RECIPE, *plan.ingredients]
    }
    whole, *others = (((plan.own_changes(own[0]), plan.trial_of(own[0])), name) for name, own in runs.items())
    if same := [name for changes, name in others if changes == whole[0]]:
        raise ValueError(f"`ingredients` must lack something of the recipe as it was tuned, but {same} are the same.")
    return runs


def _seeds_of_the_comparison(plan):
    return range(plan.search_seeds, plan.search_seeds + plan.seeds[RECIPE][0])


def expert_runs(plan: RecipePlan, best: Run) -> dict[int, list[Run]]:
    """The recipe by its number of experts, for as many steps, with the seeds of the comparison."""
    own = changed_fields(best, plan)["num_experts"]
    changed = {
        number: replace(best, ablation=(NUM_EXPERTS, f"{best.ablation[1]}, {number}")) for number in plan.nums_experts
    }
    return {
        number: with_seeds([best if number == own else run], _seeds_of_the_comparison(plan))
        for number, run in changed.items()
    }


def dense_runs(plan: RecipePlan, best: Run, tokens_of: Run) -> list[Run]:
    """Dense models of several sizes on the tokens of another run, with its seed."""
    return [
        replace(run_of_steps(run_of_size(best, size, plan.budgets[-1], plan), tokens_of.steps), seed=tokens_of.seed)
        for size in plan.dense_sizes
    ]
