# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of stored facts: what there is to store, how it is measured, which runs are made, and resuming."""

import json
import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from main_runs import run_main
from slow_tests import slow
from torch import nn

from studies.capacity import __main__ as capacity_study
from studies.capacity import forgetting, plan, reading
from studies.capacity.facts import KEY_TOKENS, VOCABULARY, make_facts, measure
from studies.capacity.forgetting import teach_after
from studies.capacity.plan import (
    ARM_TRIALS,
    MOST_BEYOND,
    MULTIPLIER,
    ONE_ROUND,
    ROUNDS,
    STAGES,
    TRIAL_SEED,
    TRIED,
    Load,
    Run,
    arm_trials,
    best,
    chosen,
    first_trials,
    make_run,
    settings_of,
    steady,
    trials,
)
from studies.capacity.report import describe, ratio
from studies.capacity.training import optimizer_of, store_facts, training_arguments
from studies.capacity.variants import AT_EQUAL_FLOPS, costs, make_model
from studies.common.parallel_runs import next_runs_of, results_of
from studies.common.study_folder import read_json


class Oracle(nn.Module):
    """Predicts the next token of the sequences that it knows with probability one half, and others by chance."""

    def __init__(self, sequences: list[list[int]], vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.next = {tuple(own[:end]): own[end] for own in sequences for end in range(1, len(own))}

    def forward(self, tokens):
        odds = torch.zeros(*tokens.shape, self.vocabulary)
        for row, own in enumerate(tokens.tolist()):
            for end in range(1, len(own) + 1):
                if (known := self.next.get(tuple(own[:end]))) is not None:
                    odds[row, end - 1, known] = math.log(self.vocabulary - 1)
        return SimpleNamespace(logits=odds)


def test_bits_of_who_knows_all_and_of_who_knows_nothing():
    facts, controls = make_facts(50, 4, seed=0)
    knows = Oracle(facts.tokens.tolist(), VOCABULARY)
    assert facts.bits == 50 * 8 * 4
    assert measure(knows, facts) == {"bits": pytest.approx(50 * 8 * (4 - 1), rel=1e-5), "recalled": 1.0}
    # By chance a token of a value takes all 8 bits of the vocabulary, 4 more than it has.
    unseen = measure(knows, controls["unseen keys"])
    assert unseen == {"bits": pytest.approx(-50 * 8 * 4, rel=1e-5), "recalled": 0.0}
    assert measure(knows, controls["permuted values"])["bits"] < 0


def test_keys_differ_and_begin_as_asked():
    facts, controls = make_facts(3000, 8, seed=1, first_tokens=range(250, 254))
    keys = torch.cat([facts.tokens, controls["unseen keys"].tokens])[:, :KEY_TOKENS]
    assert len(keys.unique(dim=0)) == 6000
    assert keys[:, 0].unique().tolist() == [250, 251, 252, 253] and keys[:, 1:].max() == 255
    permuted = controls["permuted values"].tokens
    assert torch.equal(permuted[:, :KEY_TOKENS], facts.tokens[:, :KEY_TOKENS])
    assert (permuted[:, KEY_TOKENS:] != facts.tokens[:, KEY_TOKENS:]).any(1).all()
    assert torch.equal(make_facts(3000, 8, seed=1, first_tokens=range(250, 254))[0].tokens, facts.tokens)
    assert {own["labels"][KEY_TOKENS - 1].item() for own in facts.examples} == {-100}


def test_facts_have_tokens_of_their_own():
    half = range(VOCABULARY // 2, VOCABULARY)
    for first_tokens, tokens in ((half, half), (half, range(VOCABULARY))):
        known, controls = make_facts(200, 7, 1, first_tokens, tokens)
        sequences = torch.cat([known.tokens, controls["unseen keys"].tokens])
        assert sequences.min() >= tokens[0] and sequences[:, 0].min() >= half[0]
        assert len(sequences[:, :KEY_TOKENS].unique(dim=0)) == 400
        assert sequences.max() == VOCABULARY - 1


def test_variants_take_as_many_flops():
    flops = {name: costs(name).total.flops for name in AT_EQUAL_FLOPS}
    assert max(flops.values()) <= 1.05 * min(flops.values())
    assert flops["dense"] <= min(flops[name] for name in flops if name.startswith("peer")) * 1.02


def bits_around(optimum):
    """The bits of a run that has most at the settings of an optimum."""

    def bits(run):
        own = settings_of(run)
        return 1e6 - sum(1e4 * math.log2(own[axis] / value) ** 2 for axis, value in optimum.items() if axis in own)

    return bits


def made(bits):
    """The results of all runs that store facts, without those that teach second ones."""
    results, next_runs = {}, next_runs_of([stage for stage in STAGES if stage[0] is not ARM_TRIALS])
    while missing := next_runs(results):
        for run in missing:
            stored = {"bits": bits(run), "recalled": 0.0}
            own = {"subject": run.subject, "seed": run.seed, "stored": stored, "offered": 2e6}
            controls = {name: {"bits": -1.0} for name in ("unseen keys", "permuted values")}
            results[run.name] = own | {"controls": controls, "in_bits": {"8": stored, "4": stored}}
    return results


def test_the_search_finds_the_optimum_on_each_axis():
    optimum = {"learning_rate": 2.8e-3, "up_multiplier": 8, "down": 768, "warmup": 0.1, "initializer_range": 0.04}
    optimum |= {"batch_size": 128}
    results = made(bits_around(optimum))
    for name in TRIED:
        own = settings_of(chosen(name, results))
        if name in ONE_ROUND:  # which has no other batch
            assert own.pop("batch_size") == 256
        assert own == pytest.approx({axis: optimum[axis] for axis in own}), name
        # Both neighbors of each value were tried.
        tried = [settings_of(run) for run in trials(name, results)]
        for axis in own:
            place = ROUNDS[-1][axis].index(optimum[axis])
            for near in (ROUNDS[-1][axis][place - 1], ROUNDS[-1][axis][place + 1]):
                assert any(each[axis] == pytest.approx(near) for each in tried), (name, axis)
    measured = defaultdict(lambda: 0.1)
    described = describe(results, {"seconds_per_fact": measured, "tokens_per_second": measured})
    assert "peer-65536" in described and "dense-596" in described


def test_no_variant_has_more_trials_than_another_by_design():
    assert {len(first_trials(name)) for name in TRIED} == {12}
    results = made(bits_around({"learning_rate": 2e-3}))
    for names in ({*ONE_ROUND}, {*TRIED} - {*ONE_ROUND}):
        numbers = {name: len(trials(name, results)) for name in names}
        assert max(numbers.values()) - min(numbers.values()) <= 2, numbers


def test_trials_of_a_way_to_teach_go_on_beyond_the_ends():
    # Full finetuning is tried with other rates by the rate of v_i: the highest of one of them is no end of the other.
    arm = arm_trials("full", {})
    lefts = {run.name: {"stored": {"bits": run.learning_rate == 1e-3 and run.multiplier == MULTIPLIER}} for run in arm}
    (beyond,) = arm_trials("full", lefts)[4:]
    assert (beyond.learning_rate, beyond.multiplier) == (2e-3, MULTIPLIER)
    # Bits of the first facts below zero count as none.
    bits = {run.name: left for run, left in zip(arm, (-9, -2, 1, -3), strict=True)}
    lefts = {name: {"left": {"bits": left}, "gained": {"bits": 4}} for name, left in bits.items()}
    assert best(arm, lefts) == arm[2] and best(arm[:2], lefts) == arm[0]
    results: dict = {}
    while missing := [run for run in arm_trials("lora", results) if run.name not in results]:
        results |= {run.name: {"stored": {"bits": run.learning_rate}} for run in missing}
    assert len(results) == len(ARM_TRIALS["lora"]) + MOST_BEYOND


def test_seeds_that_fail_are_made_again_at_half_the_rate():
    trial = make_run("peer-1024", learning_rate=2e-3, up_multiplier=4, down=48)
    made = {trial.name: {"stored": {"bits": 9}}}
    first = steady(trial, made)
    assert [run.seed for run in first] == [1, 2, 3] and TRIAL_SEED not in {run.seed for run in first}
    for bits, factor in (
        *(((9, 8, 5), 1), ((9, 9, 4), 0.5), ((9, 4), 0.5), ((9, math.nan), 0.5), ((9, 8), 1)),
        *(((4,), 0.5), ((5,), 1), ((4, 4, 4), 0.5), ((19,), 0.5)),  # the trial beside
    ):
        seeds = {run.name: {"stored": {"bits": own}} for run, own in zip(first, bits, strict=False)}
        again = steady(trial, made | seeds)
        assert {run.learning_rate for run in again} == {factor * first[0].learning_rate}


def test_dense_trains_as_long():
    """As often as the times of the results allow."""
    file = Path(plan.__file__).with_name("results.json")
    times = read_json(file)["times"]["seconds_per_fact"]
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


def test_interval_of_a_ratio():
    assert ratio([8, 8, 8], [1, 1, 1]) == "8.00 (8.00 to 8.00)"
    # Logarithms of 2 and of one half around zero: the standard error is log 2 / sqrt(3).
    half = math.exp(4.303 * math.log(2) / math.sqrt(3))
    assert ratio([2, 1, 0.5], [1, 1, 1]) == f"1.00 ({1 / half:.2f} to {half:.2f})"


def test_stores_facts_and_none_of_the_controls(tmp_path):
    result = store_facts(Run("facts", "peer-1024", Load(64, 8, 60), 8e-3), tmp_path)
    offered = result["offered"]
    assert result["stored"]["bits"] > 0.9 * offered
    assert all(control["bits"] < 0 for control in result["controls"].values())
    assert result["in_bits"][8]["bits"] == pytest.approx(result["stored"]["bits"], rel=0.01)
    assert result["in_bits"][4]["bits"] < result["in_bits"][8]["bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a study in which all ways to teach begin with the same model."""
    return tmp_path_factory.mktemp("forgetting")


@pytest.mark.parametrize(("kind", "arm"), [("apart", arm) for arm in ARM_TRIALS] + [("forgetting", "full")])
def test_second_facts(kind, arm, folder, monkeypatch):
    monkeypatch.setattr(forgetting, "BEFORE", Load(64, 8, 60))
    monkeypatch.setattr(forgetting, "BEFORE_APART", Load(64, 7, 60))
    monkeypatch.setattr(forgetting, "REFERENCE", 32)
    result = teach_after(Run(kind, arm, Load(64, 7, 20), 4e-3), folder)
    assert result["before"]["bits"] > 0.05 * result["offered"]["old"]
    assert result["gained"]["bits"] > 0
    assert len(result["gates_open"]) == 2 * (arm == "protected")
    whole, is_whole = costs("peer-16384").total.parameters, arm in ("full", "replay")
    assert result["trained_parameters"] == whole if is_whole else result["trained_parameters"] < whole


@pytest.mark.parametrize("arm", ["protected", "lora"])
def test_second_facts_do_not_depend_on_what_a_process_drew_before(arm, folder, monkeypatch):
    monkeypatch.setattr(forgetting, "BEFORE_APART", Load(64, 7, 60))
    monkeypatch.setattr(forgetting, "REFERENCE", 32)
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(teach_after(Run("apart", arm, Load(64, 7, 4), 4e-3), folder))
    assert results[0] == results[1]


@slow
def test_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    load = Load(256, 8, 1)
    runs = [Run("facts", name, load, 1e-3) for name in ("dense", "peer-1024")]
    monkeypatch.setattr(capacity_study, "TIMED", {"dense": 128, "peer-1024": 256})
    monkeypatch.setattr(reading, "ROUNDS", 1)
    monkeypatch.setattr(reading, "WARM_UPS", 1)
    monkeypatch.setattr(capacity_study, "STAGES", ((["all"], lambda name, results: runs[: 1 + len(results)]),))
    run_main(capacity_study, "--output_dir", tmp_path, "--hours", "0")
    assert "the same command goes on" in capsys.readouterr().out
    run_main(capacity_study, "--output_dir", tmp_path)
    assert "the same command goes on" not in capsys.readouterr().out
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*.json")}
    assert len(files) == 2
    run_main(capacity_study, "--output_dir", tmp_path)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*.json")}
    times = json.loads((tmp_path / "results.json").read_text())["times"]
    assert all(0 < each < 1e5 for measured in times.values() for each in measured.values())
    results = results_of(tmp_path)
    assert results[runs[1].name].items() >= asdict(runs[1]).items()
    other = tmp_path / "other"
    run_main(capacity_study, "--output_dir", other, "--results", tmp_path / "results.json", "--hours", "0")
    assert results_of(other) == results
