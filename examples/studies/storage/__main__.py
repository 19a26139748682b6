# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Finds the learning rates at which dense, MoE, PKM and PEER models of equal FLOPs store most facts, equally tuned.

    ./run study storage                # the whole plan, about five hours on two cores
    ./run study storage --hours 2      # as much of it as two hours allow; the same command goes on
    ./run study storage --results examples/studies/storage/results.json    # goes on from these runs
"""

from contextlib import nullcontext, suppress
from pathlib import Path

from common.command_line import parse_arguments
from common.machine import machine
from studies.capacity.facts import KEY_TOKENS, VALUE_TOKENS
from studies.capacity.plan import Results, Run
from studies.capacity.training import BATCH_SIZE, store_facts
from studies.capacity.variants import SHARED
from studies.common.parallel_runs import ParallelArguments, make_runs
from studies.common.study_folder import claim_folder, sole_use, write_runs
from studies.storage.plan import STAGES
from studies.storage.report import describe


def next_runs(results: Results) -> list[Run]:
    """The missing runs, as far as the results so far determine them."""
    missing: list[Run] = []
    for subjects, runs_of in STAGES:
        for subject in subjects:
            # Runs that depend on missing results are not known yet.
            with suppress(KeyError) if missing else nullcontext():
                missing += [run for run in runs_of(subject, results) if run.name not in results]
    return missing


def main():
    (args,) = parse_arguments((ParallelArguments,), __doc__)
    folder = Path(args.output_dir or "runs/storage")
    with sole_use(folder):
        claim_folder(folder, {"shared": SHARED, "tokens": [KEY_TOKENS, VALUE_TOKENS], "batch_size": BATCH_SIZE})
        results, is_finished = make_runs(args, folder, next_runs, store_facts)
        write_runs(folder / "results.json", {"command": "./run study storage", "machine": machine()}, results)
        print(f"\n{describe(results)}\n\nResults are in {folder}.")
        if not is_finished:
            print("The study is not finished: the same command goes on.")


if __name__ == "__main__":
    main()
