# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of onset: repeated passages, what is measured of copying, and which runs are made."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from modeling_peer import PeerForCausalLM
from studies.common.parallel_runs import next_runs_of
from studies.onset import training
from studies.onset.models import PLACEMENTS, make_model
from studies.onset.plan import BIG, SMALL, STAGES, Run, best, trials
from studies.onset.report import describe, onset, plot
from studies.onset.texts import ASKED, BLOCK, LONGEST, SHORTEST, VOCABULARY, copying_questions, repeat_passages
from studies.onset.training import batches_of, make, make_step, nats_copied, token_losses


class Copier(nn.Module):
    """Predicts that a token follows again what it followed last, and all tokens alike where it is new."""

    def forward(self, tokens):
        odds = torch.zeros(*tokens.shape, VOCABULARY)
        for row, own in enumerate(tokens.tolist()):
            last: dict = {}
            for place, token in enumerate(own):
                if token in last:
                    odds[row, place, last[token]] = 9.0
                if place + 1 < len(own):
                    last[token] = own[place + 1]
        return SimpleNamespace(logits=odds)


def test_every_other_sequence_repeats_a_passage():
    blocks = np.arange(100 * BLOCK, dtype=np.int64).reshape(100, BLOCK)
    repeated = repeat_passages(blocks)
    assert (repeated[1::2] == blocks[1::2]).all()
    for before, after in zip(blocks[::2], repeated[::2], strict=True):
        changed = np.flatnonzero(before != after)
        assert SHORTEST <= len(changed) <= LONGEST and changed[-1] - changed[0] == len(changed) - 1
        (distance,) = {int(each) for each in changed - (after[changed] - before[0])}
        assert distance >= len(changed)


def test_who_copies_gains_only_by_copying():
    text = torch.randperm(4 * BLOCK).view(2, 2, BLOCK) % VOCABULARY
    repeated, alone = copying_questions(text)
    assert torch.equal(repeated[:, -ASKED:], repeated[:, ASKED : 2 * ASKED])
    assert torch.equal(repeated[:, -ASKED:], alone[:, -ASKED:])
    losses = [token_losses(Copier(), each)[:, -ASKED + 1 :].mean() for each in (repeated, alone)]
    assert losses[0] < losses[1] - 1
    assert nats_copied(Copier()) > 2
    assert nats_copied(make_model("one", SMALL, SMALL, 0)) == pytest.approx(0, abs=0.01)


def test_attention_begins_with_weights_of_its_own():
    small, big = (make_model("alternate", SMALL, attention, 0) for attention in (SMALL, BIG))
    for (name, one), other in zip(small.named_parameters(), big.parameters(), strict=True):
        assert torch.allclose(other, one * (BIG / SMALL if "self_attn" in name else 1)), name
    assert [type(layer.mlp).__name__ == "PeerFeedForward" for layer in big.model.layers] == [False, True] * 2


def test_rates_of_tables():
    model = make_model("one", SMALL, SMALL, 0)
    step = make_step(model, Run("one", up=0.25, down=12.0), 10)
    groups = step.__closure__[[*step.__code__.co_freevars].index("optimizer")].cell_contents.param_groups
    rates = {id(each): group["initial_lr"] for group in groups for each in group["params"]}
    pool = model.model.layers[2].mlp.expert_pool
    assert rates[id(pool.up_proj.weight)] == pytest.approx(1e-3)
    assert rates[id(pool.down_proj.weight)] == pytest.approx(48e-3)
    assert rates[id(model.model.norm.weight)] == pytest.approx(4e-3)


def test_all_placements_are_searched_alike(tmp_path):
    results: dict = {}
    best_at = {"up": 1.0, "down": 0.75, "learning_rate": 2e-3, "initializer_range": 0.16, "attention": BIG}
    while missing := next_runs_of(STAGES)(results):
        for run in missing[:5]:
            distances = [abs(math.log(value / best_at[axis])) for axis, value in run.settings.items()]
            loss = sum(distances) + (run.placement != "one")
            probes = [[50, 0.1], [100, 2.0 if run.attention == BIG else 0.2]]
            results[run.name] = {"text": loss, "repeated": loss, "copied": 1.0, "probes": probes, "parameters": 1e6}
    found = {placement: trials(placement, results) for placement in PLACEMENTS}
    for placement, runs in found.items():
        assert best(runs, results).settings.items() <= best_at.items(), placement
        # Both neighbors of the best value of each axis, as far as there are two.
        assert {run.learning_rate for run in runs} == {1e-3, 2e-3, 4e-3, 8e-3}
        assert {run.initializer_range for run in runs} == {0.02, 0.04, 0.08, 0.16}
    assert {run.up for run in found["peer"]} == {0.0625, 0.25, 1.0, 4.0}
    assert len({*map(len, (found[name] for name in PLACEMENTS if name != "dense"))}) == 1
    assert len(results) == sum(map(len, found.values())) + 3 * len(PLACEMENTS) + 3
    assert [onset(results[each.name]) for each in (found["dense"][0], found["dense"][-1])] == [math.inf, 100]
    described = describe(results, {"4096": dict.fromkeys(PLACEMENTS, 0.1)})
    assert described.count("100, 100, 100") == len(PLACEMENTS) and described.count("-, -, -") == 1
    plot(results, tmp_path / "picture.png")


def test_a_run_learns_and_is_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PROBED_EVERY", 4)
    monkeypatch.setattr(Run, "steps", 6)
    monkeypatch.setattr(training, "SEQUENCES", 2)
    monkeypatch.setattr(training, "make_model", smaller)
    generator = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", generator.integers(9, size=(5, BLOCK)).astype(np.int16))
    np.save(tmp_path / "held_out.npy", generator.integers(9, size=(2, 2, BLOCK)).astype(np.int16))
    batches = batches_of(tmp_path, Run("one"), 2).flatten(0, 1)
    assert len(batches) == 12 and len(batches[:5].unique(dim=0)) == 5
    first, again = (make(Run("one", learning_rate=1e-2), tmp_path) for _ in range(2))
    assert [step for step, _ in first["probes"]] == [4, 6]
    assert first["text"] < math.log(VOCABULARY) - 0.1
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def smaller(placement, *arguments) -> PeerForCausalLM:
    """A model whose experts are few."""
    model = make_model("dense", *arguments)
    return model
