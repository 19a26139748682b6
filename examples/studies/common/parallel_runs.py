# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Making several runs of a study at once, each in a process of its own. An interrupted study can be resumed."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from studies.common.study_folder import read_json, write_json


# The results of runs by their names.
Results = dict[str, dict[str, Any]]


@dataclass
class ParallelArguments:
    """Where to save the results, and for how long to make runs."""

    output_dir: str = field(default="", metadata={"help": "Output folder, runs/ with the name of the study if empty."})
    results: str | None = field(
        default=None, metadata={"help": "A results.json whose runs are taken that are not there."}
    )
    processes: int = field(default=2, metadata={"help": "Number of runs at once, which share the cores."})
    hours: float | None = field(
        default=None, metadata={"help": "Hours after which no further run is begun; the same command goes on."}
    )


def make_runs(
    args: ParallelArguments,
    folder: Path,
    next_runs: Callable[[Results], list[Any]],
    make: Callable[[Any, Path], dict[str, Any]],
) -> tuple[Results, bool]:
    """
    Make the runs of a study, each of which is saved as a file of the folder.

    Args:
        args (`ParallelArguments`): For how long, and how many at once.
        folder (`Path`): The folder of the study.
        next_runs (`Callable`):
            Returns the missing runs, dataclasses with a `name`, as far as the results so far determine them.
        make (`Callable`): Makes a run in that folder, in a process of its own, which imports it from its module.

    Returns:
        `tuple`: the results of all runs by their names, and whether none is missing.
    """
    until = time.time() + 3600 * (args.hours if args.hours is not None else 1000)
    if args.results is not None:
        for name, run in read_json(Path(args.results))["runs"].items():
            if not (file := folder / "runs" / f"{name}.json").exists():
                write_json(file, run)
    # For the processes that are started now.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.processes))
    making: dict[Future, Any] = {}
    own_process = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1, "initializer": _end_with_study}
    with ProcessPoolExecutor(args.processes, **own_process) as pool, tqdm() as bar:
        while True:
            results = results_of(folder)
            runs = list(dict.fromkeys(next_runs(results)))
            bar.total = bar.n + len(runs)
            bar.refresh()
            for run in [run for run in runs if run not in making.values()]:
                if len(making) < args.processes and time.time() < until:
                    making[pool.submit(_make_and_save, run, folder, make)] = run
            if not making:
                return results, not runs
            done, _ = wait(making, return_when=FIRST_COMPLETED)
            for future in done:
                del making[future]
                future.result()
                bar.update()


def next_runs_of(stages: Iterable[tuple[Iterable[str], Callable[[str, Results], list[Any]]]]) -> Callable:
    """
    For [`make_runs`], a function that returns the missing runs of stages. Each stage has its variants and the function
    that returns their runs, given the results so far, or raises `KeyError` for one that is missing.
    """

    def next_runs(results: Results) -> list[Any]:
        missing: list[Any] = []
        for subjects, runs_of in stages:
            for subject in subjects:
                # Runs that depend on missing results are not known yet.
                with suppress(KeyError) if missing else nullcontext():
                    missing += [run for run in runs_of(subject, results) if run.name not in results]
        return missing

    return next_runs


def results_of(folder: Path) -> Results:
    """The results of all runs by their names."""
    return {file.stem: read_json(file) for file in sorted((folder / "runs").glob("*.json"))}


def _end_with_study():
    """End the process of a run when the study's process does, which may be killed."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _make_and_save(run, folder, make):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write_json(folder / "runs" / f"{run.name}.json", {**asdict(run), **make(run, folder)})
