# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A search for the best settings of a run, along one axis after another."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from studies.common.parallel_runs import Results


def search(
    runs: Iterable[Any],
    axes: dict[str, Sequence[float]],
    settings_of: Callable[[Any], dict[str, float]],
    make_run: Callable[[dict[str, float]], Any],
    best: Callable[[list[Any], Results], Any],
    results: Results,
) -> list[Any]:
    """
    Trials: the first ones, and neighbors of the best one along one axis after another, as far as the results determine
    them. Along each axis the search goes on while a neighbor is better than all before. So the best value lies between
    worse ones, unless it is the last of its axis.

    Args:
        runs (`Iterable`): The first trials.
        axes (`dict`): The values of each axis, in order.
        settings_of (`Callable`): Returns the values of a run. An axis that it does not name is left out.
        make_run (`Callable`): Returns the run with these values.
        best (`Callable`): Returns the best of finished runs.
        results (`dict`): The results so far.

    Returns:
        `list`: all trials, of which the last may have no result yet.
    """
    runs = list(runs)
    if not all(run.name in results for run in runs):
        return runs
    for axis, values in axes.items():
        while axis in (settings := settings_of(found := best(runs, results))):
            place = min(range(len(values)), key=lambda each: abs(values[each] - settings[axis]))
            neighbors = [make_run(settings | {axis: value}) for value in values[max(0, place - 1) : place + 2]]
            missing = [run for run in neighbors if run not in runs]
            runs += missing
            if not all(run.name in results for run in missing):
                return runs
            if best(runs, results) == found:
                break
    return runs
