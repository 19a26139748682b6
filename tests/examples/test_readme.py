# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The code in the README runs when pasted, and its figures are those of the package and of committed results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.report import Results
from modeling_peer import PeerConfig, configuration_path, list_configurations, model_costs


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", CODE, ids=[f"block_{i}" for i in range(len(CODE))])
def test_code_runs_when_pasted(code, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip()


def test_what_it_names_exists():
    for test in set(re.findall(r"`(test_\w+\.py)`", README)):
        assert list((ROOT / "tests").rglob(test)), test
    for script in set(re.findall(r"examples/[\w/]+\.py", README)):
        assert (ROOT / script).exists(), script
    for link in set(re.findall(r"\]\((?!http)([^)]+)\)", README)):
        assert (ROOT / link).exists(), link
    fields = re.findall(r"^\| `(\w+)` \|.*\|$", README, flags=re.M)
    assert "query_norm" in fields
    assert all(hasattr(PeerConfig(), field) for field in fields)


def test_the_figures_of_the_quickstart_are_its_own():
    results = json.loads((ROOT / "docs/images/quickstart.json").read_text())
    for result in (results["peer-tiny"], results["dense-tiny"]):
        figures = rf"{result['perplexity_before']:.1f}\s+to\s+{result['perplexity_after']:.1f}"
        assert re.search(figures, README), figures


def test_the_table_of_times_is_the_benchmarks():
    results = Results(json.loads((ROOT / "examples/benchmark/results.json").read_text()))
    sizes = {"num_experts": 1024**2, "hidden_size": 512}
    contenders = ("peer", "peer_pytorch", "peer_eager", "pkm_embedding_bag", "dense", "dense_gated")
    for label, section, operation in (
        ("forward", "forward", "forward"),
        ("forward and backward", "training", "forward_backward"),
        ("training step", "training", "step"),
    ):
        fields = {"operation": operation, **sizes}
        seconds = [results.value(section, "seconds", contender=name, **fields) for name in contenders]
        (ours,) = results.records(section, contender="peer", **fields)
        cells = [
            "not measured" if time is None else f"{time * 1e3:,.0f} ms"
            for time in (*seconds, results.floor(section, ours))
        ]
        assert f"| {label} | {' | '.join(cells)} |" in README


def test_the_figures_of_repeated_experts_are_the_benchmarks():
    results = Results(json.loads((ROOT / "examples/benchmark/results.json").read_text()))
    fields = {"contender": "expert_part", "operation": "forward", "dtype": "float32"}
    values = [
        (
            results.value("experts", "unique_rows", indices=indices, **fields),
            results.value("experts", "seconds", indices=indices, **fields),
        )
        for indices in ("trained", "uniform")
    ]
    for rows, seconds in values:
        assert f"{rows:,}" in README
        assert f"{seconds * 1e3:.1f} ms" in README


def test_the_table_of_configurations():
    rows = re.findall(r"^\| `(\w+-\w+)` \| ([\d.,]+) \| ([\d.,]+) M \| ([\d.,]+) M \|$", README, flags=re.M)
    assert sorted(name for name, *_ in rows) == list_configurations()
    for name, *figures in rows:
        costs = model_costs(PeerConfig.from_pretrained(configuration_path(name)))
        counted = (costs.flops / 1e6, costs.parameters / 1e6, costs.active_parameters / 1e6)
        assert figures == [f"{counted[0]:,.2f}", f"{counted[1]:,.1f}", f"{counted[2]:,.1f}"]
