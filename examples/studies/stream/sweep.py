# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The sweep of the hyperparameters of all arms, and the seeds of those that are chosen."""

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm


def run_all(
    arms: dict[str, Any],
    seeds: int,
    run: Callable[[str, dict[str, float], int], dict[str, Any]],
    choose: Callable[[list[dict[str, Any]]], tuple[float, dict[str, dict[str, float]]]],
    extend: Callable[[list[dict[str, Any]]], list[tuple[str, dict[str, float]]]] = lambda runs: [],
) -> tuple[list[dict[str, Any]], float, dict[str, dict[str, float]]]:
    """
    Sweeps the hyperparameters of all arms with one seed, and runs the chosen ones of each arm with several seeds. The
    choice may fall on values that were not swept: these are run with the first seed, and the choice is repeated with
    the new runs.

    Args:
        arms (`dict[str, Any]`): Arms by name. The attribute `sweep` of an arm holds the hyperparameters to try.
        seeds (`int`): Number of seeds for the chosen hyperparameters.
        run (`Callable`): Makes a run from the name of an arm, its hyperparameters and a seed.
        choose (`Callable`):
            Returns, from the runs, the level of learning at which arms are compared, and the hyperparameters of each
            arm.
        extend (`Callable`, *optional*):
            Returns, from the runs of the sweep, arms and hyperparameters with which it goes on, until there are none.

    Returns:
        `tuple`: all runs, the level of learning, and the chosen hyperparameters of each arm.
    """
    swept = [(name, hyperparameters) for name, arm in arms.items() for hyperparameters in arm.sweep]
    runs = [run(*each, 0) for each in tqdm(swept, desc="Sweep")]
    tried = swept
    while further := extend(runs):
        runs += [run(*each, 0) for each in tqdm(further, desc="Beyond the sweep")]
        tried = tried + further
    level, chosen = choose(runs)
    while untried := [(name, chosen[name]) for name in arms if (name, chosen[name]) not in tried]:
        runs += [run(*each, 0) for each in tqdm(untried, desc="Chosen hyperparameters")]
        tried = tried + untried
        level, chosen = choose(runs)
    repeated = [(name, hyperparameters, seed) for seed in range(1, seeds) for name, hyperparameters in chosen.items()]
    return runs + [run(*each) for each in tqdm(repeated, desc="Seeds")], level, chosen
