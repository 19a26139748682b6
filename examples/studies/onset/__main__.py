# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Finds when small models with experts in some layers learn to copy, and which placement, rates and weights text wants.

    ./run study onset                # the whole plan, about two and a half hours on two cores
    ./run study onset --hours 1      # as much of it as an hour allows; the same command goes on
    ./run study onset --results examples/studies/onset/results.json    # goes on from these runs
"""

from pathlib import Path

from common.command_line import parse_arguments
from common.machine import machine
from studies.common.parallel_runs import ParallelArguments, make_runs, next_runs_of
from studies.common.study_folder import claim_folder, read_json, sole_use, write_json, write_runs
from studies.onset.models import SHARED
from studies.onset.plan import STAGES
from studies.onset.report import describe, plot
from studies.onset.texts import CHARACTERS, prepare
from studies.onset.training import SEQUENCES, make, measure_times


def main():
    (args,) = parse_arguments((ParallelArguments,), __doc__)
    folder = Path(args.output_dir or "runs/onset")
    with sole_use(folder):
        claim_folder(folder, {"shared": SHARED, "characters": CHARACTERS, "sequences": SEQUENCES})
        prepare(folder)
        if not (times := folder / "times.json").exists():
            write_json(times, measure_times(folder))
        results, is_finished = make_runs(args, folder, next_runs_of(STAGES), make)
        head = {"command": "./run study onset", "machine": machine(), "times": read_json(times)}
        write_runs(folder / "results.json", head, results)
        plot(results, folder / "results.png")
        print(f"\n{describe(results, head['times'])}\n\nResults and the picture are in {folder}.")
        if not is_finished:
            print("The study is not finished: the same command goes on.")


if __name__ == "__main__":
    main()
