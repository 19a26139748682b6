# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Which releases of Transformers and torch run models, said by the code that a checkpoint carries, and what others lose."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers


ROOT = Path(__file__).parents[2]


def check_releases(is_supported, monkeypatch):
    """Run `configuration_peer.py`, which Transformers imports first of the code of a checkpoint."""
    file = ROOT / "modeling_peer" / "configuration_peer.py"
    spec = importlib.util.spec_from_file_location("configuration_of_a_checkpoint", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    if is_supported:
        spec.loader.exec_module(module)
    else:
        with pytest.raises(ImportError, match="found"):
            spec.loader.exec_module(module)


@pytest.mark.parametrize("release", ["4.57.6", "5.18.2", "6.0.0.dev0", "5.19.0", "5.99.0.dev0"])
def test_releases_of_transformers(release, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", release)
    check_releases(release.startswith(("5.19", "5.99")), monkeypatch)


@pytest.mark.parametrize("release", ["2.8.1+cu128", "3.0.0", "2.9.0a0+50eac81.nv25.09", "2.99.1"])
def test_releases_of_torch(release, monkeypatch):
    """A vendor's build of a release may call itself an alpha of it."""
    monkeypatch.setattr(torch, "__version__", release)
    check_releases(release.startswith(("2.9.", "2.99")), monkeypatch)


def test_without_its_parallel_styles_the_library_only_loses_tensor_parallelism():
    """They are hidden after Transformers has imported what it needs of them itself."""
    script = """
import sys
from transformers import GenerationMixin, PreTrainedModel
sys.modules["transformers.distributed.tensor_parallel"] = None
from tiny_models import random_tokens, tiny_config, tiny_model
print(tuple(tiny_model(tiny_config("peer", "dense"))(random_tokens(2, 3)).logits.shape[:2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(2, 3)", done.stderr[-2000:]
