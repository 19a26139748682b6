# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The comparison of ways to run a model from a disk, of a small one."""

import json
import sys

import compare_disk
import pytest
from slow_tests import slow


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="rows are read from a disk on Linux only")
def test_all_ways_read_the_same_tokens(tmp_path, monkeypatch, capsys):
    sizes = {"num_experts": 256**2, "hidden_size": 64, "prompt_tokens": 32, "new_tokens": 4, "rounds": 1}
    flags = [f"--{name}={value}" for name, value in (sizes | {"output_dir": tmp_path}).items()]
    monkeypatch.setattr(sys, "argv", ["compare_disk.py", *flags])
    compare_disk.main()
    results = json.loads((tmp_path / "results.json").read_text())
    (disk,) = results["ways"][compare_disk.DISK]
    assert disk["decode, cold"]["hit_rate"] < 0.9 and disk["decode, warm"]["hit_rate"] == 1
    assert disk["decode, cold"]["bytes"] == disk["decode, warm"]["bytes"] == 2 * 64 * disk["decode, warm"]["rows"]
    assert 0 < disk["decode, warm"]["rows"] <= 4 * 2 * 2 * 128
    assert len(capsys.readouterr().out.splitlines()) > 10
