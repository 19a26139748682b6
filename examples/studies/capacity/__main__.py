# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures how many bits of facts PEER stores, beside dense, MoE and PKM models of equal FLOPs per token.

    ./run study capacity                 # the whole plan, about twelve hours on two cores
    ./run study capacity --hours 2.5     # as much of it as two and a half hours allow
    ./run study capacity --results examples/studies/capacity/results.json --hours 2.5    # goes on from these runs

Killed at any point, the same command resumes. Each run is a file in --output_dir; `results.json` there sums them up, and
tables and pictures are made from it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.command_line import parse_arguments
from common.machine import machine
from studies.capacity.facts import KEY_TOKENS, VALUE_TOKENS
from studies.capacity.plan import STAGES, Results, Run
from studies.capacity.reading import measure_times
from studies.capacity.report import describe, plot
from studies.capacity.runs import make_all
from studies.capacity.training import BATCH_SIZE
from studies.capacity.variants import SHARED
from studies.common.study_folder import claim_folder, read_json, sole_use, write_json, write_runs


@dataclass
class CapacityArguments:
    """Where to save the results, and for how long."""

    output_dir: str = field(default="runs/capacity", metadata={"help": "Output folder."})
    results: str | None = field(default=None, metadata={"help": "A results.json whose runs are reused."})
    processes: int = field(default=2, metadata={"help": "Number of runs at once, each of which has one core."})
    hours: float | None = field(
        default=None, metadata={"help": "Hours after which no further run is begun; the same command goes on."}
    )


def results_of(folder: Path) -> Results:
    """The results of all runs by their names."""
    return {file.stem: read_json(file) for file in sorted((folder / "runs").glob("*.json"))}


def next_runs(results: Results) -> list[Run]:
    """The runs that are missing of the first stage of which any is."""
    for subjects, runs_of in STAGES:
        runs = [run for subject in subjects for run in runs_of(subject, results) if run.name not in results]
        if runs:
            return list(dict.fromkeys(runs))
    return []


def main():
    (args,) = parse_arguments((CapacityArguments,), __doc__)
    folder, start = Path(args.output_dir), time.time()
    until = start + 3600 * (args.hours if args.hours is not None else 1000)
    with sole_use(folder):
        # What runs have in common, and their names do not say.
        claim_folder(folder, {"shared": SHARED, "tokens": [KEY_TOKENS, VALUE_TOKENS], "batch_size": BATCH_SIZE})
        if args.results is not None:
            for name, run in read_json(Path(args.results))["runs"].items():
                write_json(folder / "runs" / f"{name}.json", run)
        while (runs := next_runs(results_of(folder))) and time.time() < until:
            make_all(runs, folder, args.processes, until)
        times = folder / "times.json"
        if not runs and not times.exists():
            write_json(times, measure_times())
        head: dict[str, Any] = {"command": "./run study capacity", "machine": machine()}
        head["times"] = read_json(times) if times.exists() else {}
        results = results_of(folder)
        write_runs(folder / "results.json", head, results)
        plot(results, folder / "results.png")
        made = [name for name in ("results.json", "results.png") if (folder / name).exists()]
        print(f"\n{describe(results, head['times'])}\n\nIn {folder}: {', '.join(made)}")
        if runs:
            print("The study is not finished: the same command goes on.")


if __name__ == "__main__":
    main()
