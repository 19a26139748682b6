# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes runs, several at once, each in a process with one thread."""

import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from studies.capacity.forgetting import teach_after
from studies.capacity.plan import Run
from studies.capacity.training import store_composed, store_facts, store_people
from studies.common.study_folder import write_json


KINDS = {
    "facts": store_facts,
    "composed": store_composed,
    "people": store_people,
    "forgetting": teach_after,
}


def make_and_save(run: Run, folder: Path) -> None:
    """Make a run in a process of the pool."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write_json(folder / "runs" / f"{run.name}.json", {**asdict(run), **KINDS[run.kind](run, folder)})


def make_all(runs: list[Run], folder: Path, num_processes: int, until: float) -> None:
    """Make runs, of which none is begun after the time `until`."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
    with ProcessPoolExecutor(num_processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = list(runs)
        futures: set[Future] = set()
        with tqdm(total=len(runs)) as bar:
            while futures or (waiting and time.time() < until):
                while waiting and len(futures) < num_processes and time.time() < until:
                    futures.add(pool.submit(make_and_save, waiting.pop(0), folder))
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(len(done))
