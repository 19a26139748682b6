# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs that are made several at once: each once, and none waits for others than those from which it follows."""

import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from studies.common.parallel_runs import ParallelArguments, make_runs


@dataclass(frozen=True)
class Run:
    name: str


def next_runs(results):
    """A long run, a short one, and one that follows from the short one."""
    known = [Run("long"), Run("short"), *([Run("follows")] if "short" in results else [])]
    return [run for run in known if run.name not in results]


def make(run, folder: Path):
    """The long run ends when that which follows from the short one is there."""
    with open(folder / "made", "a") as made:
        made.write(f"{run.name} ")
    until = time.time() + 60
    while run.name == "long" and not (folder / "runs" / "follows.json").exists():
        if time.time() > until:
            raise TimeoutError("The run that follows waits for a long one.")
        time.sleep(0.1)
    return {}


def count_threads(run, folder: Path):
    return {"threads": torch.get_num_threads()}


def go_on(run, folder: Path):
    for _ in range(600):
        with open(folder / "time", "a") as file:
            file.write("x")
        time.sleep(0.1)


def make_one(folder: Path):
    make_runs(ParallelArguments(), folder, lambda results: [Run("only")], go_on)


def test_runs_end_with_a_study_that_is_killed(tmp_path):
    study, file = get_context("spawn").Process(target=make_one, args=(tmp_path,)), tmp_path / "time"
    study.start()
    while not file.exists():
        assert study.is_alive()
        time.sleep(0.1)
    study.kill()
    study.join()
    sizes = [0]
    while file.stat().st_size > sizes[-1]:
        sizes.append(file.stat().st_size)
        assert len(sizes) < 9
        time.sleep(1)


def test_runs_wait_for_those_alone_from_which_they_follow(tmp_path):
    results, is_finished = make_runs(ParallelArguments(), tmp_path, next_runs, make)
    assert is_finished and set(results) == {"long", "short", "follows"}
    assert sorted((tmp_path / "made").read_text().split()) == ["follows", "long", "short"]


def test_runs_made_one_at_a_time_have_all_cores(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    only = Run("only")
    arguments = ParallelArguments(processes=1)
    results, _ = make_runs(arguments, tmp_path, lambda results: [] if results else [only], count_threads)
    assert results["only"]["threads"] == os.cpu_count()
