# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark: equality of its contenders, measurements, resuming, floors, targets and tables."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from convert_peer_pytorch import convert_layer
from torch.testing import assert_close

from benchmark import __main__ as benchmark
from benchmark.__main__ import BenchmarkArguments, make_job, run_worker
from benchmark.contenders import CONTENDERS, Task, build, peer_config
from benchmark.report import Results, target_table
from benchmark.worker import LayerRun, expert_kernels, run_job
from modeling_peer.feed_forward import PeerFeedForward, PkmFeedForward


TINY = Task("peer", "forward", 16, 64, 6, num_retrieval_heads=2, num_experts_per_head=4, query_size=8)
SIZES = (
    *("--num_experts", "64", "16", "--num_tokens", "4", "--hidden_size", "16", "--wide_hidden_size", "32"),
    *("--num_retrieval_heads", "2", "--num_experts_per_head", "3", "--query_size", "8", "--allow_fallback"),
    *("--scaling_num_experts", "16", "64", "--scaling_num_tokens", "1", "4", "--repetitions", "2", "--rounds", "2"),
)


@pytest.fixture
def run_here(monkeypatch):
    """Runs the benchmark in this process, and returns the tasks that were measured."""

    def run(*flags):
        measured = []

        def worker(tasks, args, turn):
            measured.extend(tasks)
            return list(run_job(json.loads(json.dumps(make_job(tasks, args, turn)))))

        monkeypatch.setattr(benchmark, "run_worker", worker)
        monkeypatch.setattr(sys, "argv", ["benchmark", *SIZES, *map(str, flags)])
        benchmark.main()
        return measured

    return run


class TestContenders:
    """Layers that are compared as one compute one function."""

    def contender(self, name):
        task = replace(TINY, contender=name, dtype="float64")
        return build(task, "cpu"), torch.randn(1, task.num_tokens, task.hidden_size, dtype=torch.float64)

    def test_peer(self):
        for name, convert in (("peer_pytorch", convert_layer), ("peer_eager", dict)):
            rival, tokens = self.contender(name)
            ours = PeerFeedForward(peer_config(TINY, sub_keys_per_head=name == "peer_pytorch"), 0).double()
            ours.load_state_dict(convert(rival.state_dict()))
            assert_close(ours(tokens), rival(tokens))

    def test_pkm(self):
        rival, tokens = self.contender("pkm_embedding_bag")
        names = ("weight_down_embed.weight", "weight_up_embed.weight", "to_queries.0.weight", "keys")
        tensors = (rival.values.weight, rival.values.weight, rival.to_queries.weight, rival.keys)
        weights = convert_layer(dict(zip(names, tensors, strict=True)))
        ours = PkmFeedForward(peer_config(TINY, sub_keys_per_head=True), 0).double()
        weights["values.weight"] = weights.pop("expert_pool.down_proj.weight")
        del weights["expert_pool.up_proj.weight"]
        ours.load_state_dict(weights)
        assert_close(ours(tokens), rival(tokens))

    def test_trains(self):
        for name in CONTENDERS:
            if not name.endswith(("tiny", "mid", "part", "int8", "int4")):
                module, tokens = self.contender(name)
                module(tokens).sum().backward()
                assert all(parameter.grad is not None for parameter in module.parameters()), name


class TestMeasurement:
    def test_training_step_moves_weights_and_has_two_moments(self):
        task = replace(TINY, operation="step")
        run = LayerRun(build(task, "cpu"), task, "cpu", None)
        before = [parameter.clone() for parameter in run.module.parameters()]
        run.prepare()
        run()
        facts = run.facts()
        assert all((old != new).any() for old, new in zip(before, run.module.parameters(), strict=True))
        assert facts["state_bytes"] >= 2 * 4 * sum(weight.numel() for weight in before)
        assert 0 < facts["unique_rows"] <= TINY.num_tokens * TINY.num_active

    def test_kernels_are_those_of_the_device(self):
        module = PeerFeedForward(peer_config(TINY, expert_kernels="torch"), 0)
        assert expert_kernels(module, "cpu", allow_fallback=True) == "torch"
        with pytest.raises(RuntimeError, match="--allow_fallback"):
            expert_kernels(module, "cpu", allow_fallback=False)


class TestRun:
    def test_all_sections(self, run_here, tmp_path):
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

    def test_goes_on(self, run_here, tmp_path):
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

    def test_other_settings(self, run_here, tmp_path):
        flags = ("--output_dir", tmp_path, "--sections", "decode", "--contenders", "dense-tiny")
        run_here(*flags)
        file = tmp_path / "results.json"
        file.write_text(file.read_text().replace('"threads": ', '"threads": 9'))
        with pytest.raises(ValueError, match=r"other \['threads'\]: --overwrite"):
            run_here(*flags)

    def test_ended_process(self, monkeypatch):
        tasks = [TINY, replace(TINY, operation="step")]
        done = SimpleNamespace(returncode=-9, stdout=json.dumps({**asdict(TINY), "seconds": [1.0]}) + "\n")
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
        first, second = run_worker(tasks, BenchmarkArguments(), 0)
        assert first["seconds"] == [1.0] and "signal 9" in second["reason"] and second["operation"] == "step"
        done.returncode = 1
        with pytest.raises(RuntimeError, match="peer could not be measured"):
            run_worker(tasks, BenchmarkArguments(), 0)


class TestReport:
    def results(self, peer_seconds=(0.2, 0.1, 0.3), **fields):
        """A forward and a forward with backward at the largest size, by hand."""
        task = Task("peer", "forward_backward")
        machine = replace(task, contender="machine")
        work = {"row_read_bag": 8e9, "row_read_select": 9e9, "write": 4e9, "query_product": 1, "key_product": 1}
        work |= {"query_product_dx": 1, "query_product_dw": 1}
        records = [
            {**asdict(replace(machine, operation=name)), "seconds": [2.0, 1.0], "work": value}
            for name, value in work.items()
        ]
        records.append({**asdict(task), "seconds": list(peer_seconds), "unique_rows": 10**6, "peak_bytes": 10**9})
        records.append({**asdict(replace(task, contender="peer_pytorch")), "seconds": [2.0]})
        records.append({**asdict(replace(task, contender="doge_cdmoe")), "seconds": [], "reason": "too large"})
        return Results({"training": {"settings": {"device": "cpu"} | fields, "measurements": records}})

    def test_floor(self):
        results = self.results()
        (record,) = results.records("training", contender="peer")
        rows = 2 * 10**6 * 512 * 4  # read twice at 9 GB/s, the better of two ways, and a gradient written at 4 GB/s
        assert results.floor("training", record) == pytest.approx(rows * (2 / 9e9 + 1 / 4e9) + 4 * 1.0)
        assert results.over_floor("training", contender="peer") == pytest.approx(
            0.2 / results.floor("training", record)
        )

    def test_of_quantized_tables(self):
        """The gain by 8 bits is 3, that of bare reads 2."""
        task = Task("expert_part", "forward", 1024, dtype="bfloat16", indices="uniform")
        read = replace(task, contender="machine", operation="row_read_select", indices=None)
        write = replace(read, operation="write")
        records = [
            {**asdict(each), "seconds": [seconds], "work": 1e9, "unique_rows": 10**5}
            for each, seconds in (
                *((task, 3.0), (replace(task, contender="expert_part_int8"), 1.0), (read, 0.4), (write, 0.1)),
                *((replace(task, contender="expert_part_int4"), 4.0), (replace(read, dtype="int8"), 0.2)),
                (replace(write, dtype="int8"), 0.1),
            )
        ]
        results = Results({"quantized": {"settings": {"device": "cpu"}, "measurements": records}})
        rows = {line[:62].strip(): line[62:].split()[2:] for line in target_table(results).splitlines()}
        assert rows["experts alone, d = 1024: gain by 8 bits / gain of bare reads"] == ["1.50"]
        assert rows["experts alone, d = 1024: time of 4 bits / bfloat16"] == ["1.33", "missed"]
        floors = [results.floor("quantized", records[place]) for place in (0, 1, 4)]
        elements = 2 * 10**5 * 1024  # at 2.5 GB/s in bfloat16, at 5 GB/s in integers
        assert floors == pytest.approx([2 * elements / 2.5e9, elements / 5e9, elements / 2 / 5e9])
