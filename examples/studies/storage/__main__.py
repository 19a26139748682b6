# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Finds the learning rates at which dense, MoE, PKM and PEER models of equal FLOPs store most facts, equally tuned.

    ./run study storage                # the whole plan, about five hours on two cores
    ./run study storage --hours 2      # as much of it as two hours allow; the same command goes on
    ./run study storage --results examples/studies/storage/results.json    # goes on from these runs
"""

from pathlib import Path

from common.command_line import parse_arguments
from common.machine import machine
from studies.capacity.facts import KEY_TOKENS, VALUE_TOKENS
from studies.capacity.reading import measure_times
from studies.capacity.training import BATCH_SIZE, store_facts
from studies.capacity.variants import SHARED
from studies.common.parallel_runs import ParallelArguments, make_runs, next_runs_of
from studies.common.study_folder import claim_folder, read_json, sole_use, write_json, write_runs
from studies.storage.plan import EXPOSURES, FULL, LIKE, STAGES
from studies.storage.report import PAIRS, describe


TIMED = (LIKE, FULL, PAIRS[LIKE], *EXPOSURES)


def main():
    (args,) = parse_arguments((ParallelArguments,), __doc__)
    folder = Path(args.output_dir or "runs/storage")
    with sole_use(folder):
        claim_folder(folder, {"shared": SHARED, "tokens": [KEY_TOKENS, VALUE_TOKENS], "batch_size": BATCH_SIZE})
        if not (times := folder / "times.json").exists():
            write_json(times, measure_times(folder, TIMED))
        results, is_finished = make_runs(args, folder, next_runs_of(STAGES), store_facts)
        head = {"command": "./run study storage", "machine": machine(), "times": read_json(times)}
        write_runs(folder / "results.json", head, results)
        print(f"\n{describe(results, head['times'])}\n\nResults are in {folder}.")
        if not is_finished:
            print("The study is not finished: the same command goes on.")


if __name__ == "__main__":
    main()
