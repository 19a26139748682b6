# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A search for the best settings of a run along one axis after another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.common.parallel_runs import Results


def search(
    runs: list[Any],
    axes: Mapping[str, Sequence[float]],
    settings_of: Callable[[Any], dict[str, float]],
    moved: Callable[[Any, str, float], Any],
    best: Callable[[list[Any], Results], Any],
    results: Results,
) -> list[Any]:
    """
    First trials and neighbors of the best one, as far as the results determine them. Along each axis, in their order,
    the search goes on while a neighbor is better than all before. So the best value lies between worse ones on each
    axis, unless it is the last of the axis.

    Args:
        runs (`list`): The first trials.
        axes (`Mapping[str, Sequence[float]]`): The ascending values of each axis.
        settings_of (`Callable`): Returns the value of each axis that a run has.
        moved (`Callable`): Returns a run with another value on an axis.
        best (`Callable`): Returns the best of some runs.
        results (`Results`): Results by the names of runs.
    """
    if not all(run.name in results for run in runs):
        return runs
    for axis, values in axes.items():
        while axis in (settings := settings_of(found := best(runs, results))):
            place = min(range(len(values)), key=lambda each: abs(values[each] - settings[axis]))
            neighbors = [moved(found, axis, each) for each in values[max(0, place - 1) : place + 2]]
            missing = [run for run in neighbors if run not in runs]
            runs = [*runs, *missing]
            if not all(run.name in results for run in missing):
                return runs
            if best(runs, results) == found:
                break
    return runs
