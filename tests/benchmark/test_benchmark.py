# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark: equality of its contenders, measurements, resuming, floors, targets and tables."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from main_runs import run_main
from torch.testing import assert_close

from benchmark import __main__ as benchmark
from benchmark.__main__ import make_job
from benchmark.contenders import Task, build, peer_config
from benchmark.report import Results
from benchmark.worker import run_job
from modeling_peer.experts import expert_index
from modeling_peer.feed_forward import PeerFeedForward, PkmFeedForward


TINY = Task("peer", "forward", 16, 64, 6, num_retrieval_heads=2, num_experts_per_head=4, query_size=8)
SIZES = (
    *("--num_experts", "64", "16", "--num_tokens", "4", "--hidden_size", "16", "--wide_hidden_size", "32"),
    *("--num_retrieval_heads", "2", "--num_experts_per_head", "3", "--query_size", "8", "--allow_fallback"),
    *("--scaling_num_experts", "16", "64", "--scaling_num_tokens", "1", "4", "--repetitions", "2", "--rounds", "2"),
)


def run_here(*flags):
    """Runs the benchmark in this process, and returns the tasks that were measured."""
    measured = []

    def worker(tasks, args, turn):
        measured.extend(tasks)
        return list(run_job(json.loads(json.dumps(make_job(tasks, args, turn)))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "run_worker", worker)
        run_main(benchmark, *SIZES, *flags)
    return measured


def contender(name):
    task = replace(TINY, contender=name, dtype="float64")
    return build(task), torch.randn(1, task.num_tokens, task.hidden_size, dtype=torch.float64)


def convert_layer(state_dict):
    """The state dict of a `PeerFeedForward` that computes what a layer of PEER-pytorch does."""
    num_heads, size, _, dim_key = state_dict["keys"].shape
    # Of (half, head, feature) to (head, half, feature), and from experts row by row to those of shells.
    queries = state_dict["to_queries.0.weight"].unflatten(0, (2, num_heads, dim_key)).transpose(0, 1).flatten(0, 2)
    order = expert_index(*torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten().argsort()
    return {
        "router.query_proj.weight": queries,
        "router.sub_keys": state_dict["keys"].transpose(1, 2),
        "expert_pool.up_proj.weight": state_dict["weight_down_embed.weight"][order],
        "expert_pool.down_proj.weight": state_dict["weight_up_embed.weight"][order],
    }


def test_contenders_of_peer_are_one_function():
    for name, convert in (("peer_pytorch", convert_layer), ("peer_eager", dict)):
        rival, tokens = contender(name)
        ours = PeerFeedForward(peer_config(TINY, sub_keys_per_head=name == "peer_pytorch"), 0).double()
        ours.load_state_dict(convert(rival.state_dict()))
        assert_close(ours(tokens), rival(tokens))


def test_contenders_of_pkm_are_one_function():
    rival, tokens = contender("pkm_embedding_bag")
    names = ("weight_down_embed.weight", "weight_up_embed.weight", "to_queries.0.weight", "keys")
    tensors = (rival.values.weight, rival.values.weight, rival.to_queries.weight, rival.keys)
    weights = convert_layer(dict(zip(names, tensors, strict=True)))
    ours = PkmFeedForward(peer_config(TINY, sub_keys_per_head=True), 0).double()
    weights["values.weight"] = weights.pop("expert_pool.down_proj.weight")
    del weights["expert_pool.up_proj.weight"]
    ours.load_state_dict(weights)
    assert_close(ours(tokens), rival(tokens))


def test_all_sections(tmp_path):
    measured = run_here("--output_dir", tmp_path)
    sections = json.loads((tmp_path / "results.json").read_text())
    assert list(sections) == list(benchmark.SECTIONS)
    for section in sections.values():
        assert section["settings"]["threads"] == torch.get_num_threads()
        assert all(len(record["seconds"]) == 2 for record in section["measurements"])
    assert len(measured) == 2 * sum(len(section["measurements"]) for section in sections.values())
    peer = Results(sections).records("training", contender="peer", operation="step", num_experts=64)
    assert len(peer) == 1 and peer[0]["peak_bytes"] is not None and peer[0]["state_bytes"] > 0
    assert Results(sections).floor("training", peer[0]) > 0
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_goes_on(tmp_path):
    flags = ("--output_dir", tmp_path, "--sections", "forward", "--contenders", "peer", "dense")
    assert run_here(*flags, "--repetitions", "1", "--rounds", "1")
    file = tmp_path / "results.json"
    sections = json.loads(file.read_text())
    first = list(sections["forward"]["measurements"])
    del sections["forward"]["measurements"][-1]  # as if stopped before it
    file.write_text(json.dumps(sections))
    assert [asdict(task) for task in run_here(*flags)].count({name: first[-1][name] for name in asdict(TINY)}) == 2
    again = json.loads(file.read_text())["forward"]["measurements"]
    assert again[0]["seconds"][0] == first[0]["seconds"][0] and len(again[-1]["seconds"]) == 2
    assert run_here(*flags) == []
    assert run_here(*flags, "--overwrite")


def test_floor():
    """Of rows that are read twice at 9 GB/s, the better of two ways, and whose gradient is written at 4 GB/s."""
    task = Task("peer", "forward_backward")
    work = {"row_read_bag": 8e9, "row_read_select": 9e9, "write": 4e9}
    work |= dict.fromkeys(("query_product", "key_product", "query_product_dx", "query_product_dw"), 1)
    records = [
        {**asdict(replace(task, contender="machine", operation=name)), "seconds": [2.0, 1.0], "work": value}
        for name, value in work.items()
    ]
    record = {**asdict(task), "seconds": [0.2, 0.1, 0.3], "unique_rows": 10**6}
    results = Results({"training": {"settings": {"device": "cpu"}, "measurements": [*records, record]}})
    expected = 2 * 10**6 * 512 * 4 * (2 / 9e9 + 1 / 4e9) + 4 * 1.0
    assert results.floor("training", record) == pytest.approx(expected)
