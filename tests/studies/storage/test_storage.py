# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of rates: which trials are made, and which rates they have."""

import math
from collections import defaultdict
from pathlib import Path

import pytest

from studies.capacity.plan import Run
from studies.capacity.training import optimizer_of, training_arguments
from studies.capacity.variants import make_model
from studies.common.parallel_runs import next_runs_of
from studies.common.study_folder import read_json
from studies.storage import plan
from studies.storage.plan import AXES, STAGES, TRIED, chosen, first_trials, make_run, settings_of, trials
from studies.storage.report import describe


def bits_around(optimum):
    """The bits of a run that has most at the settings of an optimum."""

    def bits(run):
        own = settings_of(run)
        return 1e6 - sum(1e4 * math.log2(own[axis] / value) ** 2 for axis, value in optimum.items() if axis in own)

    return bits


def made(bits):
    """The results of a whole study."""
    results, next_runs = {}, next_runs_of(STAGES)
    while missing := next_runs(results):
        for run in missing:
            stored = {"bits": bits(run), "recalled": 0.0}
            results[run.name] = {"subject": run.subject, "seed": run.seed, "stored": stored, "offered": 2e6}
    return results


def test_the_search_finds_the_optimum_on_each_axis():
    optimum = {"learning_rate": 2.8e-3, "up_multiplier": 8, "down": 768, "warmup": 0.1, "initializer_range": 0.04}
    results = made(bits_around(optimum))
    for name in TRIED:
        own = settings_of(chosen(name, results))
        assert own == pytest.approx({axis: optimum[axis] for axis in own}), name
        # Both neighbors of each value were tried.
        tried = [settings_of(run) for run in trials(name, results)]
        for axis in own:
            place = AXES[axis].index(optimum[axis])
            for near in (AXES[axis][place - 1], AXES[axis][place + 1]):
                assert any(each[axis] == pytest.approx(near) for each in tried), (name, axis)
    described = describe(results, {"seconds_per_step": defaultdict(lambda: 0.1)})
    assert "peer-65536" in described and "dense-596" in described


def test_no_variant_has_more_trials_than_another_by_design():
    assert {len(first_trials(name)) for name in TRIED} == {12}
    results = made(bits_around({"learning_rate": 2e-3}))
    numbers = {name: len(trials(name, results)) for name in TRIED}
    assert max(numbers.values()) - min(numbers.values()) <= 2, numbers


def test_dense_trains_as_long():
    """As often as the times of the results allow."""
    file = Path(plan.__file__).with_name("results.json")
    times = read_json(file)["times"]["seconds_per_step"]
    expected = {name: round(plan.LEARNED.exposures * times[plan.LIKE] / times[name]) for name in plan.EXPOSURES}
    assert expected == plan.EXPOSURES


def test_settings_are_those_of_the_optimizer(tmp_path):
    """The rates of u_i, v_i and of dense feed-forwards, as multiples of the learning rate."""
    for run, rates in (
        (make_run("peer-1024", learning_rate=1e-3, up_multiplier=4, down=48), {"up_proj": 4, "down_proj": 48}),
        (make_run("pkm-8281", learning_rate=1e-3, down=384), {"values": 384}),
        (make_run("dense", learning_rate=1e-3, up_multiplier=2), {"up_proj": 2, "gate_proj": 2, "down_proj": 2}),
    ):
        assert settings_of(run)["learning_rate"] == 1e-3
        model = make_model(run.subject, 0)
        optimizer = optimizer_of(model, training_arguments(run, tmp_path), run)
        names = {id(parameter): name.split(".")[-2] for name, parameter in model.named_parameters()}
        found = {names[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
        assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
        for name, rate in found.items():
            assert rate == pytest.approx(1e-3 * rates.get(name, 1)), name
    assert Run("facts", "dense", run.load, 1e-3).name != run.name
