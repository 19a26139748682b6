# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures how many bits of facts PEER stores, beside dense, MoE and PKM models of equal FLOPs per token, equally tuned.

    ./run study capacity                 # the whole plan, about ten hours on two cores
    ./run study capacity --hours 2.5     # as much of it as two and a half hours allow
    ./run study capacity --results examples/studies/capacity/results.json --hours 2.5    # goes on from these runs

After an interruption, the same command resumes. Each run is a file in --output_dir; `results.json` there sums them up,
and tables and pictures are made from it.
"""

from pathlib import Path

from common.command_line import parse_arguments
from common.machine import machine
from studies.capacity.facts import KEY_TOKENS, VALUE_TOKENS
from studies.capacity.forgetting import make
from studies.capacity.plan import BATCH_AS_LONG, BATCH_SIZE, EXPOSURES, FULL, LIKE, STAGES
from studies.capacity.reading import measure_times
from studies.capacity.report import PAIRS, describe, plot
from studies.capacity.variants import SHARED
from studies.common.parallel_runs import ParallelArguments, make_runs, next_runs_of
from studies.common.study_folder import claim_folder, read_json, sole_use, write_json, write_runs


# Variants whose training is timed, with the batch of dense for dense ones, and else with that of the first round.
TIMED = dict.fromkeys((LIKE, FULL, PAIRS[LIKE]), BATCH_SIZE) | dict.fromkeys(EXPOSURES, BATCH_AS_LONG)


def main():
    (args,) = parse_arguments((ParallelArguments,), __doc__)
    folder = Path(args.output_dir or "runs/capacity")
    with sole_use(folder):
        # Settings that all runs share and that their names do not contain.
        claim_folder(folder, {"shared": SHARED, "tokens": [KEY_TOKENS, VALUE_TOKENS], "batch_size": BATCH_SIZE})
        if not (times := folder / "times.json").exists():
            measured = read_json(Path(args.results))["times"] if args.results else measure_times(folder, TIMED)
            write_json(times, measured)
        results, is_finished = make_runs(args, folder, next_runs_of(STAGES), make)
        head = {"command": "./run study capacity", "machine": machine(), "times": read_json(times)}
        write_runs(folder / "results.json", head, results)
        plot(results, folder / "results.png")
        print(f"\n{describe(results, head['times'])}\n\nResults and the picture are in {folder}.")
        if not is_finished:
            print("The study is not finished: the same command goes on.")


if __name__ == "__main__":
    main()
