# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The comparison of initializations of a graft: its measurements, resuming, and the committed table."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from graft_models import base_model_of
from main_runs import run_main
from transformers import LlamaForCausalLM

from common.text_data import train_tokenizer
from studies.graft_starts import __main__ as graft_starts


def test_measures_and_goes_on(monkeypatch, tmp_path):
    """Of a tiny host."""
    corpus = Dataset.from_dict({"text": ["One word, and another one. " * 100] * 8})
    tokenizer = train_tokenizer(corpus, "text", 300, 256)
    tokenizer.save_pretrained(tmp_path / "host")
    base_model_of("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "host")
    monkeypatch.setattr(graft_starts, "load_corpus", lambda name: DatasetDict(train=corpus, validation=corpus))
    flags = ("--output_dir", tmp_path / "starts", "--model_name_or_path", tmp_path / "host", "--num_experts", 16**2)
    flags += ("--steps", 2, "--eval_blocks", 2, "--learning_rates", "1e-3", "3e-3")
    seen = []
    loss_of = graft_starts.loss_of
    monkeypatch.setattr(graft_starts, "loss_of", lambda model, text: seen.append(text) or loss_of(model, text))
    run_main(graft_starts, *flags)
    results = json.loads((tmp_path / "starts" / "results.json").read_text())
    host = LlamaForCausalLM.from_pretrained(tmp_path / "host").eval()
    assert results["host"] == loss_of(host, seen[0])
    torch.nn.init.zeros_(host.model.layers[1].mlp.down_proj.weight)
    assert results["without feed-forward"] == loss_of(host, seen[0])
    away = {name: abs(results[name]["at the start"] - results["host"]) for name in ("random", "neurons")}
    assert away["neurons"] < away["random"] / 2
    for start in ("random", "neurons"):
        assert results[start]["learning rate 0.003"] < results[start]["at the start"]
        assert results[start]["learning rate 0.003"] != results[start]["learning rate 0.001"]
    monkeypatch.setattr(graft_starts, "train", lambda *_, **__: pytest.fail("a run that is there is made again"))
    run_main(graft_starts, *flags)
    assert json.loads((tmp_path / "starts" / "results.json").read_text()) == results
