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
"""The notebook runs from top to bottom in the folder in which it is opened, here with fewer steps."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "peer_in_ten_minutes.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(ROOT / "examples" / "checkpoints")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(folder)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    printed, names = [], {}
    for source in code:
        fewer = source.replace("STEPS = 100", "STEPS = 4").replace("num_steps=200", "num_steps=20")
        exec(compile(fewer, NOTEBOOK.name, "exec"), names)
        printed.append(capsys.readouterr().out)
    assert all(printed), "each cell shows something"
    assert names["STEPS"] == 4 and any("deviation=0.0" in each for each in printed)
    assert "True\n" in printed and "False\n" not in printed  # without the added experts it is what it was
    (shown, *_) = ("".join(cell["outputs"][0]["text"]) for cell in cells if cell["cell_type"] == "code")
    assert printed[0] == shown  # what is saved is of the checkpoint as it is
    assert (tmp_path / "runs" / "experts.html").stat().st_size > 20_000


def test_outputs_of_the_notebook_are_small():
    assert NOTEBOOK.stat().st_size < 40_000
