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

import math
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
        search_seeds (`list[int]`):
            Number of seeds of the first round of the search, and of how many more the second round has. A variant and
            its parent are paired by them.
        searched (`list[str]`): Variants that are compared with their parents.
        finalists (`int`): How many of them come to the second round.
        alternatives (`list[list[str]]`):
            Groups of these that are values of one setting: at most two of a group are finalists, at most one is adopted.
        combined (`list[str]`): Combinations of what was adopted, which are compared with their parents in both rounds.
        trials (`dict[str, list[dict]]`):
            For each variant that is compared, learning rates and further changes to choose from: equally many. At
            another size the learning rate is divided by what the size is multiplied by.
        hidden_sizes (`dict[str, list[list[int]]]`):
            For each variant and budget, sizes to choose from; none for a variant that a budget is not spent on.
        seeds (`dict[str, list[int]]`): For each variant and budget, the number of seeds that figures are means over.
        dense_sizes (`list[int]`): Sizes of dense models that are trained on as many tokens as the recipe.
        nums_experts (`list[int]`): Numbers of experts that the recipe is tried with.
        ingredients (`list[str]`): Variants that lack one ingredient of the recipe each.
    """

    budgets: list[float]
    hidden_size: int
    learning_rate: float
    search_seeds: list[int]
    searched: list[str]
    finalists: int
    alternatives: list[list[str]]
    combined: list[str]
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
        for field in ("searched", "combined", "trials", "seeds", "hidden_sizes", "ingredients"):
            if unknown := set(getattr(self, field)) - self.variants.keys():
                raise ValueError(f"`{field}` must name some of `variants`, but got {sorted(unknown)} among them.")
        for field in ("searched", "combined"):
            for name in getattr(self, field):
                if "parent" not in self.variants[name]:
                    raise ValueError(f"`{field}` must name variants that have a `parent`, but {name!r} has none.")
        numbers = {variant: len(trials) for variant, trials in self.trials.items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"`trials` must be equally many for all variants, but there are {numbers}.")
        for group in self.alternatives:
            if not set(self.searched).issuperset(group):
                raise ValueError(f"`alternatives` must name some of `searched`, but got {group}.")
        for field in ("seeds", "hidden_sizes"):
            for name, values in getattr(self, field).items():
                if len(values) != len(self.budgets):
                    raise ValueError(
                        f"`{field}` of {name!r} must have one entry per budget, {len(self.budgets)}, but got {values}."
                    )
        self._check_the_recipe()

    def _check_the_recipe(self):
        """What would otherwise fail after hours, once there is a recipe."""
        if RECIPE not in self.trials:
            return
        for field in ("seeds", "hidden_sizes"):
            if missing := self.trials.keys() - getattr(self, field).keys():
                raise ValueError(f"`{field}` must have all variants of `trials`, but lacks {sorted(missing)}.")
        if trial := self.trial_of(Run(RECIPE, self.hidden_size, 1, self.learning_rate)):
            raise ValueError(f"The recipe must have no `trial`, as its time would not be measured, but has {trial}.")
        if self.hidden_sizes[RECIPE][-1] != self.hidden_sizes[DENSE][-1]:
            raise ValueError(
                f"The last `hidden_sizes` of the recipe must be those of dense, {self.hidden_sizes[DENSE][-1]}, as they "
                f"are compared at equal seconds, but got {self.hidden_sizes[RECIPE][-1]}."
            )
        if both := set(self.ingredients) & self.trials.keys():
            raise ValueError(
                f"`ingredients` must not be in `trials`, as they have the trial of the recipe, but {sorted(both)} are."
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
        changes = merge_changes(*self.lineage(run.variant), self.tuned_changes(run))
        return {name: value for name, value in changes.items() if name not in ("parent", "trial")}

    def tuned_changes(self, run: Run) -> dict[str, Any]:
        """What the trial of a run changes, and its number of experts if that is varied, but for the learning rate."""
        if run.ablation is None:
            return {}
        trials = self.trials[RECIPE if run.variant in self.ingredients else run.variant]
        group, trial = run.ablation
        num_experts, _, trial = trial.partition(", ") if group == NUM_EXPERTS else ("", "", trial)
        changes = (
            {name: value for name, value in trials[int(trial)].items() if name != "learning_rate"} if trial else {}
        )
        return changes | ({"num_experts": int(num_experts)} if num_experts else {})

    @property
    def all_search_seeds(self) -> range:
        """The seeds of both rounds of the search. Those of the comparison follow them."""
        return range(sum(self.search_seeds))

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
    """The runs of the first round of the search by variant: dense, those that are searched, and their parents."""
    return {
        name: with_seeds([run_of_the_search(plan, name)], range(plan.search_seeds[0]))
        for name in _with_parents(plan, [DENSE, PEER], plan.searched)
    }


def second_round_runs(plan: RecipePlan, results: dict[str, dict]) -> dict[str, list[Run]]:
    """
    The runs of both rounds by variant, of those that were furthest below their parents in the first and of their
    parents.
    """
    first = search_runs(plan)

    def loss_over_parent(name):
        pairs = zip(first[name], first[plan.variants[name]["parent"]], strict=True)
        return sum(_loss(results[own.name]) - _loss(results[other.name]) for own, other in pairs)

    finalists: list[str] = []
    for name in sorted(plan.searched, key=loss_over_parent):
        better = [other for group in plan.alternatives if name in group for other in group if other in finalists]
        if len(finalists) < plan.finalists and len(better) < 2:
            finalists.append(name)
    return {
        name: with_seeds([run_of_the_search(plan, name)], plan.all_search_seeds)
        for name in _with_parents(plan, [PEER], finalists)
    }


def combination_runs(plan: RecipePlan) -> dict[str, list[Run]]:
    """The runs of combinations by variant, and of their parents."""
    return {
        name: with_seeds([run_of_the_search(plan, name)], plan.all_search_seeds)
        for name in _with_parents(plan, [], plan.combined)
    }


def _with_parents(plan, first, names):
    return dict.fromkeys([*first, *(plan.variants[name]["parent"] for name in names), *names])


def run_of_the_search(plan: RecipePlan, variant: str) -> Run:
    """The run of a variant in the search, with the first seed."""
    return run_of_budget(variant, plan.hidden_size, plan.budgets[0], plan.learning_rate, plan)


def tuning_runs(plan: RecipePlan) -> dict[str, list[Run]]:
    """
    The runs of the tuning by variant, one for each trial, with the first seed. A trial that has a learning rate alone
    is a run of the search, if it has the rate of the search. A trial without others need not be made.
    """
    return {
        variant: [_run_of_trial(plan, variant, index) for index in range(len(trials))]
        for variant, trials in plan.trials.items()
    }


def _run_of_trial(plan, variant, index):
    trial = plan.trials[variant][index]
    ablation = None if trial.keys() == {"learning_rate"} else (TUNING, str(index))
    return run_of_budget(variant, plan.hidden_size, plan.budgets[0], trial["learning_rate"], plan, ablation)


def runs_to_tune(plan: RecipePlan) -> dict[str, list[Run]]:
    """[`tuning_runs`] of each variant that has a choice."""
    return {variant: runs for variant, runs in tuning_runs(plan).items() if len(runs) > 1}


def runs_beyond(plan: RecipePlan, results: dict[str, dict]) -> dict[str, Run]:
    """
    For each variant whose best trial has the lowest or the highest of the learning rates, a run beyond it: with this
    rate divided or multiplied by the square root of two.
    """
    found = {}
    for variant, runs in runs_to_tune(plan).items():
        best, rates = _lowest(runs, results), [run.learning_rate for run in runs]
        factor = {min(rates): 0.5**0.5, max(rates): 2**0.5}.get(best.learning_rate)
        if factor is not None:
            found[variant] = replace(best, learning_rate=_rounded(best.learning_rate * factor))
    return found


def _rounded(rate):
    return float(f"{rate:.3g}")


def _lowest(runs, results):
    return runs[0] if len(runs) == 1 else min(runs, key=lambda run: _loss(results[run.name]))


def _loss(result):
    """Infinite if the run diverged: comparisons with NaN are false, whatever is compared."""
    loss = corpus_loss(result)
    return math.inf if math.isnan(loss) else loss


def tuned(plan: RecipePlan, results: dict[str, dict]) -> dict[str, Run]:
    """The run of each variant that has the lowest loss on the held-out part of the training texts, of all trials."""
    beyond = runs_beyond(plan, results)
    return {
        variant: _lowest([*runs, *([beyond[variant]] if variant in beyond else [])], results)
        for variant, runs in tuning_runs(plan).items()
    }


def run_of_size(best: Run, hidden_size: int, budget: float, plan: RecipePlan) -> Run:
    """A run of another size with the trial that a variant was tuned to, and its learning rate by the rule."""
    rate = _rounded(best.learning_rate * best.hidden_size / hidden_size)
    return run_of_budget(best.variant, hidden_size, budget, rate, plan, best.ablation)


def size_runs(plan: RecipePlan, best: Run, budget: float) -> list[Run]:
    """The runs of a variant at each size of a budget, with the first seed. A size without others need not be made."""
    return [
        run_of_size(best, size, budget, plan) for size in plan.hidden_sizes[best.variant][plan.budgets.index(budget)]
    ]


def runs_by_size(plan: RecipePlan, best: dict[str, Run], budget: float) -> dict[str, list[Run]]:
    """[`size_runs`] of each variant that a budget is spent on."""
    sizes = {variant: size_runs(plan, run, budget) for variant, run in best.items()}
    return {variant: runs for variant, runs in sizes.items() if runs}


def choose_size(runs: list[Run], results: dict[str, dict]) -> Run:
    """The run with the lowest loss on the held-out part of the training texts."""
    return _lowest(runs, results)


def compared_runs(plan: RecipePlan, chosen: Run, budget: float) -> list[Run]:
    """The run of the size that was chosen, with seeds that nothing was chosen with."""
    return with_seeds([chosen], _seeds_of_the_comparison(plan, chosen.variant, budget))


def _seeds_of_the_comparison(plan, variant, budget):
    first = len(plan.all_search_seeds)
    return range(first, first + plan.seeds[variant][plan.budgets.index(budget)])


def runs_of_widths(
    plan: RecipePlan, best: dict[str, Run], budget: float, step_seconds: Callable[[Run], float]
) -> dict[str, list[Run]]:
    """Dense at each size of a budget, and the recipe at the same sizes, for as many steps as take the same seconds."""
    dense, recipe = (size_runs(plan, best[variant], budget) for variant in (DENSE, RECIPE))
    return {DENSE: dense, RECIPE: [run_of_seconds(*pair, step_seconds) for pair in zip(recipe, dense, strict=True)]}


def ingredient_runs(plan: RecipePlan, best: Run) -> dict[str, list[Run]]:
    """
    The recipe, and without each of its ingredients, at the rate of the recipe, the first budget and the seeds of the
    comparison. Raises `ValueError` if what remains is the recipe itself.
    """
    rate, seeds = best.learning_rate, _seeds_of_the_comparison(plan, RECIPE, plan.budgets[0])
    runs = {
        name: with_seeds([run_of_budget(name, plan.hidden_size, plan.budgets[0], rate, plan, best.ablation)], seeds)
        for name in [RECIPE, *plan.ingredients]
    }
    whole, *others = (((plan.own_changes(own[0]), plan.trial_of(own[0])), name) for name, own in runs.items())
    if same := [name for changes, name in others if changes == whole[0]]:
        raise ValueError(f"`ingredients` must lack something of the recipe as it was tuned, but {same} are the same.")
    return runs


def expert_runs(plan: RecipePlan, best: Run) -> dict[int, list[Run]]:
    """The recipe by its number of experts, for as many steps, with the seeds of the comparison."""
    own, trial = changed_fields(best, plan)["num_experts"], "" if best.ablation is None else f", {best.ablation[1]}"
    seeds = _seeds_of_the_comparison(plan, RECIPE, plan.budgets[0])
    changed = {number: replace(best, ablation=(NUM_EXPERTS, f"{number}{trial}")) for number in plan.nums_experts}
    return {number: with_seeds([best if number == own else run], seeds) for number, run in changed.items()}


def dense_runs(plan: RecipePlan, best: Run, tokens_of: Run) -> list[Run]:
    """Dense models of several sizes on the tokens of another run, with its seed."""
    return [
        replace(run_of_steps(run_of_size(best, size, plan.budgets[0], plan), tokens_of.steps), seed=tokens_of.seed)
        for size in plan.dense_sizes
    ]
