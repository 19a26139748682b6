# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of the study. README.md has the criteria that judge them."""

from dataclasses import dataclass, replace

from studies.common.parallel_runs import Results


# A graft of facts also reads this number of prompts of each fact.
EXPOSURES = 12
# Arms without learning rates, which come first.
UNTRAINED = ("facts", "bm25", "nothing")
SIZE, LARGER = 240, {1000: (*UNTRAINED, "full", "lora"), 5000: UNTRAINED}
# Three learning rates of each training, tried on facts that are not reported. If the best one is the lowest or the
# highest, one more is tried beyond it.
RATES = {
    "full": (3e-5, 1e-4, 3e-4),
    "lora": (3e-4, 1e-3, 3e-3),
    "dense": (1e-3, 3e-3, 1e-2),
    "graft": (1e-2, 3e-2, 1e-1),
}
LEVEL = 0.02  # two rates whose recall of 480 questions differs by less count as equal
TIMED = ("facts", "full", "lora")
TRIAL_BLOCK, BLOCKS = 0, {240: (1, 2, 3), 1000: (1,), 5000: (1,)}


@dataclass(frozen=True)
class Run:
    """
    A run of the study.

    Args:
        arm (`str`):
            A way to teach, `"nothing"`, `"base"` for what the model knows, `"two"` for files loaded together, or
            `"seconds"` for how long teaching takes.
        number (`int`): Number of facts.
        block (`int`): Index of the set of taught facts, which is also the seed.
        learning_rate (`float`): Learning rate of a training; 0 for arms without one.
    """

    arm: str
    number: int = SIZE
    block: int = TRIAL_BLOCK
    learning_rate: float = 0.0

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.arm}-{self.number}-{self.block}-{self.learning_rate:g}"


def share(flags: str) -> float:
    """The share of ones in a string of zeros and ones, as which results of questions are saved."""
    return flags.count("1") / len(flags)


def trials(arm: str, results: Results) -> list[Run]:
    """The trials of a training."""
    runs = [Run(arm, learning_rate=rate) for rate in RATES[arm]]
    if all(run.name in results for run in runs):
        rate = best(runs, results).learning_rate
        if rate in (RATES[arm][0], RATES[arm][-1]):
            runs.append(replace(runs[0], learning_rate=rate / 3 if rate == RATES[arm][0] else rate * 3))
    return runs


def best(runs: list[Run], results: Results) -> Run:
    """The trial with the lowest rate among those within two points of the best recall in untaught wordings."""
    recalled = {run: share(results[run.name]["right"]["recall"]) for run in runs}
    return min(
        (run for run in runs if recalled[run] > max(recalled.values()) - LEVEL), key=lambda run: run.learning_rate
    )


def reported(arm: str, number: int, results: Results) -> list[Run]:
    """The runs of an arm that are reported."""
    run = best(trials(arm, results), results) if arm in RATES else Run(arm)
    return [replace(run, number=number, block=block) for block in BLOCKS[number]]


def next_runs(results: Results) -> list[Run]:
    """
    The missing runs, as far as the results so far determine them. The run that asks what the model knows comes first.
    The run of two files and that of seconds are made alone, as they are timed, and before trainings.
    """
    untrained = [run for arm in UNTRAINED for run in reported(arm, SIZE, results)]
    for stage in ([Run("base")], untrained, [Run("two", block=1)], [Run("seconds")]):
        if missing := [run for run in sorted(stage, key=lambda run: run.block) if run.name not in results]:
            return missing
    runs: list[Run] = []
    for number, arms in ((SIZE, ("lora", "full")), (SIZE, ("graft", "dense")), *LARGER.items()):
        own = []
        for arm in arms:
            tried = trials(arm, results) if arm in RATES else []
            is_known = all(run.name in results for run in tried)  # which rate is reported
            own += reported(arm, number, results) if is_known else tried
        runs += sorted(own, key=lambda run: run.block)
    return [run for run in runs if run.name not in results]
