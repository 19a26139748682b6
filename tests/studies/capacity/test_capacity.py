# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of stored facts: what there is to store, how it is measured, which runs are made, and resuming."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from main_runs import run_main
from slow_tests import slow
from torch import nn

from studies.capacity import __main__ as capacity_study
from studies.capacity import forgetting, reading
from studies.capacity.facts import KEY_TOKENS, VOCABULARY, make_facts, measure
from studies.capacity.forgetting import teach_after
from studies.capacity.plan import (
    ARM_TRIALS,
    LONG_WARMUP,
    LOW_MULTIPLIER,
    MOST_BEYOND,
    MULTIPLIER,
    RATES,
    RATES_OF_OTHERS,
    TRIAL_SEED,
    WARMUP,
    Load,
    Run,
    arm_trials,
    best,
    chosen,
    learning,
    trials,
)
from studies.capacity.report import ratio
from studies.capacity.training import store_facts
from studies.capacity.variants import AT_EQUAL_FLOPS, WIDE, costs
from studies.common.parallel_runs import results_of


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
    for name in WIDE:
        peer = name.removeprefix("dense-as-")
        assert costs(name).total.parameters == pytest.approx(costs(peer).total.parameters, rel=0.01)


def test_trials_go_on_beyond_the_ends():
    def result(runs, bits_of):
        return {run.name: {"stored": {"bits": bits_of(run)}} for run in runs}

    first = trials("mlp", {})
    assert len(first) == 9 and {run.seed for run in first} == {TRIAL_SEED}
    highest = result(first, lambda run: run.learning_rate - run.warmup)
    (beyond,) = trials("mlp", highest)[9:]
    assert (beyond.learning_rate, beyond.warmup) == (2 * max(run.learning_rate for run in first), WARMUP)
    assert trials("mlp", highest | result([beyond], lambda run: math.nan))[9:] == [beyond]
    (lower,) = trials("mlp", result(first, lambda run: -run.learning_rate))[9:]
    assert lower.learning_rate == min(RATES) / 2
    # The highest rate with one warmup is no end with the other.
    (long,) = trials("mlp", result(first, lambda run: run.learning_rate + run.warmup))[9:]
    assert (long.learning_rate, long.warmup) == (2 * RATES_OF_OTHERS[-1], LONG_WARMUP)
    results: dict = {}
    while missing := [run for run in trials("mlp", results) if run.name not in results]:
        results |= result(missing, lambda run: run.learning_rate)
    assert len(results) == 9 + MOST_BEYOND
    # Full finetuning is tried with other rates by the rate of v_i: the highest of one of them is no end of the other.
    arm = arm_trials("full", {})
    (beyond,) = arm_trials(
        "full", result(arm, lambda run: run.learning_rate == 1e-3 and run.multiplier == MULTIPLIER)
    )[4:]
    assert (beyond.learning_rate, beyond.multiplier) == (2e-3, MULTIPLIER)
    # Bits of the first facts below zero count as none.
    bits = {run.name: left for run, left in zip(arm, (-9, -2, 1, -3), strict=True)}
    lefts = {name: {"left": {"bits": left}, "gained": {"bits": 4}} for name, left in bits.items()}
    assert best(arm, lefts) == arm[2] and best(arm[:2], lefts) == arm[0]
    assert len(trials("peer-256", {})) == 3 and len(trials("moe-32", {})) == 4
    tables = trials("peer-1024", {})
    assert len(tables) == 9 and len({run.multiplier for run in tables}) == 2
    found = result(tables, lambda run: (run.learning_rate == 2e-3) + (run.multiplier == LOW_MULTIPLIER))
    taken = chosen("peer-1024", found)
    assert (taken.learning_rate, taken.multiplier) == (2e-3, LOW_MULTIPLIER)
    # Experts, a memory of as many parameters, and dense go on beyond the best multiplier and warmup.
    tables = trials("peer-16384", {})
    *_, doubled, longer = trials("peer-16384", result(tables, lambda run: run.learning_rate == 2e-3))
    assert (doubled.multiplier, doubled.warmup) == (2 * MULTIPLIER, tables[1].warmup)
    assert (longer.multiplier, longer.warmup) == (MULTIPLIER, 2 * tables[1].warmup)
    longer = trials("dense", result(trials("dense", {}), lambda run: run.learning_rate == 2e-3))[9:]
    assert [run.learning_rate for run in longer] == pytest.approx([1.4e-3, 2e-3, 2.8e-3])
    assert {run.warmup for run in longer} == {2 * WARMUP}
    assert TRIAL_SEED not in {run.seed for run in learning("peer-1024", found)}


def test_seeds_that_fail_are_made_again_at_half_the_rate():
    made = {run.name: {"stored": {"bits": 9 * (run.learning_rate == 2e-3)}} for run in trials("peer-1024", {})}
    first = learning("peer-1024", made)
    assert [run.seed for run in first] == [1, 2, 3]
    for bits, factor in (
        *(((9, 8, 5), 1), ((9, 9, 4), 0.5), ((9, 4), 0.5), ((9, math.nan), 0.5), ((9, 8), 1)),
        *(((4,), 0.5), ((5,), 1), ((4, 4, 4), 0.5), ((19,), 0.5)),  # the trial beside
    ):
        seeds = {run.name: {"stored": {"bits": own}} for run, own in zip(first, bits, strict=False)}
        again = learning("peer-1024", made | seeds)
        assert {run.learning_rate for run in again} == {factor * first[0].learning_rate}


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
    runs = [Run("facts", name, load, 1e-3) for name in ("dense", "peer-256")]
    monkeypatch.setattr(reading, "VARIANTS", ["dense", "peer-256"])
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
