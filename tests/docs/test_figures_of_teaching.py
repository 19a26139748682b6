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
"""The figures of the page on teaching a domain are those of the runs that it names, and of the study of streams."""

import json
import re
import shlex

import pytest
from documentation import ROOT
from teach_domain import DOMAIN, KEPT, DomainTrainingArguments, Figures, TeachingArguments

from common.command_line import command_to_share
from studies.stream.report import measures


TEXT = (ROOT / "docs/teach-a-domain.md").read_text()
PROSE = " ".join(TEXT.split())
RUNS = json.loads((ROOT / "docs/images/teach-a-domain.json").read_text())

# Runs that change one flag of the command are called by it.
CHANGES = [name for name in RUNS if name.startswith("--")]


def row(label, perplexities):
    return f"| {label} | {perplexities[DOMAIN]:.1f} | {perplexities[KEPT]:.2f} |"


def figures(name):
    return Figures(**{key: RUNS[name][key] for key in ("before", "openness", "shared", "after", "masked")})


def study(**hyperparameters):
    """What protected growth learned and forgot in the study of streams with these hyperparameters and the first seed."""
    runs = json.loads((ROOT / "examples/studies/stream/results.json").read_text())["runs"]
    (run,) = (
        each for each in runs if (each["arm"], each["seed"], each["settings"]) == ("protected", 0, hyperparameters)
    )
    return measures(run)


def test_what_the_command_prints():
    assert f"```\n{figures('default')}\n```" in TEXT


def test_the_command_is_that_of_the_runs():
    command = re.search(r"(examples/teach_domain\.py .*?) --kept_standard_library", PROSE.replace("\\ ", ""))[1]
    flags = {name: f" --kept_standard_library {name}" for name in CHANGES}
    flags |= {"default": " --kept_standard_library", "written": ""}
    for name, run in RUNS.items():
        expected = command_to_share(shlex.split(f"{command}{flags[name]} --output_dir"))
        assert command_to_share(shlex.split(run["command"])).startswith(expected)


def test_the_table_of_runs():
    rows = [row("before", RUNS["default"]["before"]), row("as above", RUNS["default"]["after"])]
    rows += [row(f"`{name}`", RUNS[name]["after"]) for name in CHANGES]
    assert "\n".join(rows) in TEXT


@pytest.mark.parametrize("name", RUNS)
def test_every_model_was_restored_to_the_bit(name):
    assert figures(name).is_restored


def test_the_sentence_on_written_text():
    before, after = RUNS["default"]["before"][KEPT], RUNS["written"]["standard_library"]
    assert f"went from {before:.2f} to {after:.2f}" in PROSE
    assert f"went from {before:.2f} to {RUNS['default']['after'][KEPT]:.2f}" in PROSE
    assert f"the domain came to {RUNS['written']['after'][DOMAIN]:.1f}" in PROSE


def test_defaults_are_those_of_the_page():
    rows = dict(re.findall(r"^\| `--(\w+)` \| ([\d.,]+) \|", TEXT, flags=re.M))
    defaults = {**TeachingArguments().__dict__}
    fields = DomainTrainingArguments.__dataclass_fields__
    defaults |= {name: fields[name].default for name in rows if name not in defaults}
    assert len(rows) == 6
    for name, shown in rows.items():
        assert float(shown.replace(",", "")) == defaults[name], name


def test_reasons_are_those_of_the_study():
    chosen = study(learning_rate=0.01, reference_weight=16)
    lighter, slower = study(learning_rate=0.01, reference_weight=4), study(learning_rate=0.003, reference_weight=16)
    assert f"forgot {chosen['forgetting']:.3f} nats per token and learned {chosen['learning']:.2f}" in PROSE
    for other in (lighter, slower):
        assert f"forgot {other['forgetting']:.3f} and learned {other['learning']:.2f}" in PROSE
    runs = json.loads((ROOT / "examples/studies/stream/results.json").read_text())["runs"]
    means = [measures(run)["final_mean"] for run in runs if run["arm"] == "protected"]
    assert chosen["final_mean"] == min(means)
