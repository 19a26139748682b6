# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan of the recipe study: what is searched, tuned and compared, and which runs that takes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from studies.common.training_plan import (
    DENSE,
    PEER,
    Run,
    TrainingPlan,
    changed_fields,
    corpus_loss,
    merge_changes,
    named_configuration,
    run_of_budget,
    run_of_seconds,
    run_of_steps,
)


# The variant that the search ends with.
RECIPE = "recipe"

# Groups of changes of a variant, see `Run.ablation`: trials of the tuning, numbers of experts, factors, and exponents.
TUNING, NUM_EXPERTS, FACTORS, EXPONENT = "tuning", "num_experts", "factors", "exponent"

# The factor of a design that distinguishes its two seeds.
BLOCK = "seed"

# The training argument that multiplies the learning rate of the output tables.
DOWN_RATE = "down_proj_lr_multiplier"

# At a larger size, the learning rate may be divided by the ratio of sizes to the power of one of these exponents.
EXPONENTS = (1.0, 0.5, 0.0)

# The first seed of the comparison: nothing was chosen with it or those after it.
FIRST_SEED = 3


@dataclass
class RecipePlan(TrainingPlan):
    """
    What the study compares. It is read from a JSON file, such as `plans/two-cores.json`. A variant may have a
    `parent`, another variant from which it inherits everything that it does not change, and a `trial`: settings that
    no flag of run_clm.py gives, see trials.py.

    Args:
        training_texts, evaluation_texts, block_size, batch_size, eval_sequences, training, fields, variants:
            See [`TrainingPlan`].
        budgets (`list[float]`): Training FLOPs of a model, in ascending order. Search and tuning are at the first.
        hidden_size (`int`): Size of the models of search and tuning.
        learning_rate (`float`): Learning rate of the search.
        screened (`list[str]`): Variants that are compared with their parents with one seed.
        factors (`dict[str, dict]`): Changes that may be added to a variant, by their names, see [`with_factors`].
        designs (`list[dict]`):
            Experiments of the search, in order. Each has the `variant` to which the named `factors` are added, the
            number of `runs` (each factor is present in half of them), the `seeds` of the runs that are made (1, 2 or
            both), and the `bar` for adopting a factor. With `"mean"`, its mean effect must be at least one percent;
            with `"interval"`, the interval must also exclude zero.
        trials (`dict[str, list[dict]]`):
            For each compared variant, learning rates and further changes to choose from, equally many for all. At
            another size, the learning rate is divided by the ratio of sizes. At a larger size, the ratio has the
            exponent of the variant in `exponents`, and the output tables of experts and memories keep their rate.
        transfer_size (`int`, *optional*):
            Larger size at which dense and the recipe are tried with each of the `EXPONENTS`.
        exponents (`dict[str, float]`):
            For each variant, the exponent of the ratio of sizes at larger sizes, if it is not 1. It is what
            [`choose_rate`] found at the `transfer_size`, once that is known.
        hidden_sizes (`dict[str, list[list[int]]]`):
            For each variant and budget, sizes to choose from; none if the variant is not trained at this budget.
        timed_trials (`list[int]`):
            Indices of trials of the recipe. One of them is chosen for the comparison at equal seconds: at the last
            budget, at the size of dense and for its seconds.
        sizes_at_equal_seconds (`list[int]`):
            Sizes, of those of dense at the last budget, at which dense and the recipe are compared at equal seconds.
        seeds (`dict[str, list[int]]`): For each variant and budget, the number of seeds that figures are means over.
        dense_sizes (`list[int]`): Sizes of dense models that are trained on as many tokens as the recipe.
        nums_experts (`list[int]`): Numbers of experts that the recipe is tried with.
        later_runs (`list[dict]`): Runs with rates that were tried after all others. Nothing is chosen by them.
    """

    budgets: list[float]
    hidden_size: int
    learning_rate: float
    screened: list[str]
    factors: dict[str, dict[str, Any]]
    designs: list[dict[str, Any]]
    trials: dict[str, list[dict[str, Any]]]
    hidden_sizes: dict[str, list[list[int]]]
    transfer_size: int | None
    exponents: dict[str, float]
    timed_trials: list[int]
    sizes_at_equal_seconds: list[int]
    seeds: dict[str, list[int]]
    dense_sizes: list[int]
    nums_experts: list[int]
    later_runs: list[dict[str, Any]] = field(default_factory=list)

    def lineage(self, variant: str) -> list[dict[str, Any]]:
        """The changes of all ancestors of a variant, the oldest first, and of the variant itself."""
        names, name = [], variant
        while name is not None:
            names.insert(0, name)
            name = self.variants[name].get("parent")
        return [self.variants[name] for name in names]

    def own_changes(self, run: Run) -> dict[str, Any]:
        """The changes of a run: those of its variant and its ancestors, of its factors, and of its tuning."""
        changes = merge_changes(*self.lineage(run.variant), self.tuned_changes(run))
        changes = with_factors(changes, [self.factors[name] for name in factors_of(run)])
        if run.hidden_size > self.hidden_size:
            ratio = run.hidden_size / self.hidden_size
            changes = with_kept_down_rate(changes, ratio ** self.exponent_of(run))
        return {name: value for name, value in changes.items() if name not in ("parent", "trial")}

    def tuned_changes(self, run: Run) -> dict[str, Any]:
        """The changes of a run's trial, without the learning rate, and its number of experts if that is varied."""
        if run.ablation is None or run.ablation[0] == FACTORS:
            return {}
        trials = self.trials[run.variant]
        group, trial = run.ablation
        value, _, trial = trial.partition(", ") if group in (NUM_EXPERTS, EXPONENT) else ("", "", trial)
        changes = (
            {name: value for name, value in trials[int(trial)].items() if name != "learning_rate"} if trial else {}
        )
        return changes | ({"num_experts": int(value)} if group == NUM_EXPERTS else {})

    def exponent_of(self, run: Run) -> float:
        """The exponent of the ratio of sizes by which the learning rate of a run is divided."""
        if run.ablation is not None and run.ablation[0] == EXPONENT:
            return float(run.ablation[1].partition(", ")[0])
        return self.exponents.get(run.variant, 1.0) if run.hidden_size > self.hidden_size else 1.0

    def trial_of(self, run: Run) -> dict[str, Any]:
        """Settings of the training of a run that no flag of run_clm.py gives, see trials.py."""
        parts = [*self.lineage(run.variant), *(self.factors[name] for name in factors_of(run))]
        return {name: value for each in parts for name, value in each.get("trial", {}).items()}


def factors_of(run: Run) -> list[str]:
    """The factors that a run of the search has."""
    is_of_the_search = run.ablation is not None and run.ablation[0] == FACTORS
    return run.ablation[1].split("+") if is_of_the_search else []


def with_factors(changes: dict[str, Any], factors: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Add the changes of several factors to those of a named configuration, so that factors do not replace each other:
    fields in `times` are multiplied, and "peer" is set in the `blocks` of each factor. Then `feed_forward` replaces
    every "peer" in `feed_forward_types`.
    """
    if not factors:
        return changes
    merged = merge_changes(changes, *factors)
    base = named_configuration(merged["configuration"])
    for name, times in (item for factor in factors for item in factor.get("times", {}).items()):
        merged[name] = int(merged.get(name, getattr(base, name)) * times)
    types = list(merged.get("feed_forward_types", base.feed_forward_types))
    for block in (block for factor in factors for block in factor.get("blocks", ())):
        types[block] = PEER
    if feed_forward := merged.pop("feed_forward", None):
        types = [feed_forward if name == PEER else name for name in types]
    own = {name: value for name, value in merged.items() if name not in ("times", "blocks")}
    return own if types == base.feed_forward_types else own | {"feed_forward_types": types}


def with_kept_down_rate(changes: dict[str, Any], times: float) -> dict[str, Any]:
    """
    Changes of a named configuration for a wider model whose learning rate is divided by `times`, such that the output
    tables keep their rate. A row of these tables is added to hidden states like an embedding, and like that of
    embeddings, its learning rate does not depend on the width (Yang et al., arXiv 2203.03466, table 3).
    """
    training = changes.get("training", {})
    if (multiplier := training.get(DOWN_RATE)) is None:
        return changes
    return changes | {"training": training | {DOWN_RATE: multiplier * times}}


def with_seeds(runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
    """Each of the runs with each of the seeds."""
    return [replace(run, seed=seed) for run in runs for seed in seeds]


def screening_runs(plan: RecipePlan) -> dict[str, Run]:
    """The run of each variant that is screened, of its parent, and of dense; none if nothing is screened."""
    parents = [plan.variants[name]["parent"] for name in plan.screened]
    names = dict.fromkeys([DENSE, PEER, *parents, *plan.screened] if plan.screened else [])
    return {name: run_of_budget(name, plan.hidden_size, plan.budgets[0], plan.learning_rate, plan) for name in names}


def factor_levels(names: Iterable[str], num_runs: int) -> list[dict[str, bool]]:
    """
    A two-level design of resolution IV in 16 or 32 runs, halved by `BLOCK`: the effect of a factor is not confounded
    with that of another factor or with an interaction of two others. The first four or five factors have all
    combinations of levels. The levels of each further factor are the products of those of three of them, or of all
    five (Box, Hunter & Hunter, "Statistics for Experimenters", chapter 6).
    """
    number = num_runs.bit_length() - 1
    words = [word for size in (1, 5, 3) for word in combinations(range(number), size)]
    names = list(names)
    in_order = [*names[:number], BLOCK, *names[number:]] if len(names) >= number else [*names, BLOCK]
    columns = dict(zip(in_order, words, strict=False))
    return [
        {name: math.prod(signs[place] for place in word) > 0 for name, word in columns.items()}
        for signs in product((-1, 1), repeat=number)
    ]


def design_runs(plan: RecipePlan, design: dict[str, Any]) -> list[Run]:
    """The runs of a design, with seed 1 in one half and 2 in the other; only those with a seed in its `seeds`."""
    runs = []
    for levels in factor_levels(design["factors"], design["runs"]):
        seed = 2 if levels.pop(BLOCK) else 1
        present = "+".join(name for name, is_there in levels.items() if is_there)
        ablation = (FACTORS, present) if present else None
        run = run_of_budget(design["variant"], plan.hidden_size, plan.budgets[0], plan.learning_rate, plan, ablation)
        runs.append(replace(run, seed=seed))
    return sorted((run for run in dict.fromkeys(runs) if run.seed in design["seeds"]), key=lambda run: run.seed)


def search_runs(plan: RecipePlan) -> list[Run]:
    """The runs of all designs."""
    return [run for design in plan.designs for run in design_runs(plan, design)]


def tuning_runs(plan: RecipePlan) -> dict[str, list[Run]]:
    """
    The runs of the tuning by variant, one for each trial, with the first seed. A trial that only has a learning rate,
    the one of the search, is the same run as in the search. The only trial of a variant need not be made.
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
        best, rates = choose(runs, results), [run.learning_rate for run in runs]
        factor = {min(rates): 0.5**0.5, max(rates): 2**0.5}.get(best.learning_rate)
        if factor is not None:
            found[variant] = replace(best, learning_rate=_rounded(best.learning_rate * factor))
    return found


def _rounded(rate):
    return float(f"{rate:.3g}")


def choose(runs: list[Run], results: dict[str, dict]) -> Run:
    """The run with the lowest loss on the held-out part of the training texts. A single run needs no result."""
    return runs[0] if len(runs) == 1 else min(runs, key=lambda run: corpus_loss(results[run.name]))


def tuned(plan: RecipePlan, results: dict[str, dict]) -> dict[str, Run]:
    """The run of each variant that has the lowest loss on the held-out part of the training texts, of all trials."""
    beyond = runs_beyond(plan, results)
    return {
        variant: choose([*runs, *([beyond[variant]] if variant in beyond else [])], results)
        for variant, runs in tuning_runs(plan).items()
    }


def transfer_runs(plan: RecipePlan, best: dict[str, Run]) -> dict[str, list[Run]]:
    """Dense and the recipe at the `transfer_size`, with each of the `EXPONENTS`; none if the plan has no such size."""
    if plan.transfer_size is None:
        return {}
    return {
        variant: [_run_of_exponent(plan, best[variant], exponent) for exponent in EXPONENTS]
        for variant in (DENSE, RECIPE)
    }


def transfer_runs_beyond(plan: RecipePlan, best: dict[str, Run], results: dict[str, dict]) -> dict[str, Run]:
    """For each variant whose best exponent is the first or the last of the `EXPONENTS`, a run with one beyond it."""
    beyond = {}
    for variant, runs in transfer_runs(plan, best).items():
        index = runs.index(choose(runs, results))
        exponent = {0: EXPONENTS[0] + 0.5, len(runs) - 1: EXPONENTS[-1] - 0.5}.get(index)
        if exponent is not None:
            beyond[variant] = _run_of_exponent(plan, best[variant], exponent)
    return beyond


def choose_rate(runs: list[Run], results: dict[str, dict]) -> Run:
    """
    The run with the lowest learning rate among those whose perplexity is within one percent of the best. Larger
    budgets train for longer, where lower rates are better.
    """
    losses = {run: corpus_loss(results[run.name]) for run in runs}
    level = [run for run in runs if losses[run] <= min(losses.values()) + math.log(1.01)]
    return min(level, key=lambda run: run.learning_rate)


def _run_of_exponent(plan, best, exponent):
    ablation = best.ablation
    if DOWN_RATE in plan.own_changes(best).get("training", {}):  # its value depends on the exponent
        ablation = (EXPONENT, f"{exponent:g}" if ablation is None else f"{exponent:g}, {ablation[1]}")
    rate = _rate_at(best, plan.transfer_size, exponent)
    return run_of_budget(best.variant, plan.transfer_size, plan.budgets[0], rate, plan, ablation)


def _rate_at(best, hidden_size, exponent):
    return _rounded(best.learning_rate * (best.hidden_size / hidden_size) ** exponent)


def run_of_size(best: Run, hidden_size: int, budget: float, plan: RecipePlan) -> Run:
    """The run of a variant at another size, with the trial of `best` and its learning rate by the plan's rule."""
    rate = _rate_at(best, hidden_size, plan.exponent_of(replace(best, hidden_size=hidden_size)))
    return run_of_budget(best.variant, hidden_size, budget, rate, plan, best.ablation)


def size_runs(plan: RecipePlan, best: Run, budget: float) -> list[Run]:
    """The runs of a variant at each size of a budget, with the first seed. A single size need not be made."""
    return [
        run_of_size(best, size, budget, plan) for size in plan.hidden_sizes[best.variant][plan.budgets.index(budget)]
    ]


def runs_by_size(plan: RecipePlan, best: dict[str, Run], budget: float) -> dict[str, list[Run]]:
    """[`size_runs`] of each variant that is trained at a budget."""
    sizes = {variant: size_runs(plan, run, budget) for variant, run in best.items()}
    return {variant: runs for variant, runs in sizes.items() if runs}


def compared_runs(plan: RecipePlan, chosen: Run, budget: float) -> list[Run]:
    """The run of the chosen size, with seeds by which nothing was chosen."""
    return with_seeds([chosen], _seeds_of_the_comparison(plan, chosen.variant, budget))


def _seeds_of_the_comparison(plan, variant, budget):
    return range(FIRST_SEED, FIRST_SEED + plan.seeds[variant][plan.budgets.index(budget)])


def timed_trials(plan: RecipePlan) -> list[Run]:
    """The trials of the recipe of which one is compared at equal seconds."""
    return [_run_of_trial(plan, RECIPE, index) for index in plan.timed_trials]


def runs_of_timed_trials(plan: RecipePlan, dense: Run, step_seconds: Callable[[Run], float]) -> list[Run]:
    """Each of [`timed_trials`] at the size of a dense run, with as many steps as take the seconds of that run."""
    runs = [run_of_size(trial, dense.hidden_size, plan.budgets[-1], plan) for trial in timed_trials(plan)]
    return [run_of_seconds(run, dense, step_seconds) for run in runs]


def runs_of_widths(
    plan: RecipePlan, best: dict[str, Run], dense: Run, step_seconds: Callable[[Run], float]
) -> dict[str, list[Run]]:
    """Dense and the recipe at `sizes_at_equal_seconds`, with as many steps as take the seconds of a dense run."""
    return {
        variant: [
            run_of_seconds(run_of_size(best[variant], size, plan.budgets[-1], plan), dense, step_seconds)
            for size in plan.sizes_at_equal_seconds
        ]
        for variant in (DENSE, RECIPE)
    }


def expert_runs(plan: RecipePlan, best: Run) -> dict[int, list[Run]]:
    """The recipe by its number of experts, for the same number of steps, with the seeds of the comparison."""
    own, trial = changed_fields(best, plan)["num_experts"], "" if best.ablation is None else f", {best.ablation[1]}"
    seeds = _seeds_of_the_comparison(plan, RECIPE, plan.budgets[0])
    changed = {number: replace(best, ablation=(NUM_EXPERTS, f"{number}{trial}")) for number in plan.nums_experts}
    return {number: with_seeds([best if number == own else run], seeds) for number, run in changed.items()}


def dense_runs(plan: RecipePlan, best: Run, tokens_of: Run) -> list[Run]:
    """Dense models of several sizes, trained on the tokens of another run and with its seed."""
    return [
        replace(run_of_steps(run_of_size(best, size, plan.budgets[0], plan), tokens_of.steps), seed=tokens_of.seed)
        for size in plan.dense_sizes
    ]
