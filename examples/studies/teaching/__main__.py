# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compares facts taught to SmolLM2-135M by a graft of facts, by finetuning, LoRA and other adapters, and facts in the
prompt: what is recalled in other wordings, what is lost, and which taught answers are given to other questions.

    ./run study teaching                 # the whole plan, about eight hours on two cores
    ./run study teaching --hours 2.5     # as much of it as two and a half hours allow; the same command goes on
"""

from pathlib import Path
from typing import Any

from common.command_line import parse_arguments
from common.machine import machine
from studies.common.parallel_runs import ParallelArguments, make_runs
from studies.common.study_folder import claim_folder, sole_use, write_runs
from studies.teaching.measuring import Study, make
from studies.teaching.plan import EXPOSURES, next_runs
from studies.teaching.report import describe, plot


def main():
    (args,) = parse_arguments((ParallelArguments,), __doc__)
    folder = Path(args.output_dir or "runs/teaching")
    with sole_use(folder):
        claim_folder(folder, {"exposures": EXPOSURES})  # not part of the names of runs
        Study(folder).texts()  # creates the files that all processes read
        results, is_finished = make_runs(args, folder, next_runs, make)
        head: dict[str, Any] = {"command": "./run study teaching", "machine": machine()}
        write_runs(folder / "results.json", head, results)
        plot(results, folder / "results.png")
        print(f"\n{describe(results)}\n\nResults and the picture are in {folder}.")
        if not is_finished:
            print("The study is not finished: the same command goes on.")


if __name__ == "__main__":
    main()
