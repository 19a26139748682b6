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
"""The quickstart: it trains two models, and compares them after as many steps and after as many seconds."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import quickstart
from preloaded import python
from transformers import AutoConfig, AutoTokenizer, TrainerControl, TrainerState

from modeling_peer import configuration_path, model_costs


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("limit", "evaluated"), [(2.5, [3]), (3.0, [3]), (math.inf, [])])
def test_the_quickstart_evaluates_once_the_seconds_are_reached(monkeypatch, limit, evaluated):
    """Steps take a second each; what is between them, such as evaluations, does not count."""
    now = iter(range(100))
    monkeypatch.setattr(quickstart.time, "perf_counter", lambda: next(now))
    clock, found = quickstart.StepClock(limit), []
    for step in range(1, 6):
        control, state = TrainerControl(), TrainerState(global_step=step)
        clock.on_step_begin(None, state, control)
        clock.on_step_end(None, state, control)
        found += [step] if control.should_evaluate else []
    assert (found, clock.last_step, clock.seconds) == (evaluated, evaluated[0] if evaluated else 5, 5)


def test_the_verdict_of_the_quickstart_at_equal_seconds():
    """With the saved results, and as if a step of both had taken as long."""
    saved = json.loads((ROOT / "docs/images/quickstart.json").read_text())
    for result in saved.values():
        result["eval_losses"] = {int(step): loss for step, loss in result["eval_losses"].items()}
    peer, dense = saved["peer-toy"], saved["dense-toy"]
    below = 1 - peer["perplexity_at_equal_seconds"] / dense["perplexity_after"]
    said = quickstart.verdict({name: quickstart.Result(**result) for name, result in saved.items()})
    assert f"at step {peer['steps_at_equal_seconds']} of 500, with a learning rate still to fall" in said
    assert f"and {below:.1%} below dense-toy at its end" in said
    peer["steps_at_equal_seconds"] = 500
    said = quickstart.verdict({name: quickstart.Result(**result) for name, result in saved.items()})
    assert "It took no longer for them." in said and "still to fall" not in said


def test_quickstart(tmp_path):
    flags = ("--output_dir", tmp_path, "--max_steps", "8", "--block_size", "64", "--max_eval_samples", "8")
    done = subprocess.run(
        [python(), ROOT / "examples/quickstart.py", *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = done.stdout
    assert done.returncode == 0, printed
    compared = json.loads((tmp_path / "results.json").read_text())
    for name in ("peer-toy", "dense-toy"):
        costs = model_costs(AutoConfig.from_pretrained(configuration_path(name)))
        assert (compared[name]["flops_per_token"], compared[name]["sequence_length"]) == (costs.flops, 512)
        assert f"{costs.flops / 1e6:.2f}" in printed
    flops = [compared[name]["flops_per_token"] for name in ("peer-toy", "dense-toy")]
    assert flops[0] == pytest.approx(0.79 * flops[1], rel=0.01)
    for result in compared.values():
        assert result["perplexity_after"] < 0.9 * result["perplexity_before"]
        assert f"{result['perplexity_after']:.1f}" in printed
        assert f"{result['perplexity_at_equal_seconds']:.1f}" in printed
    assert compared["dense-toy"]["perplexity_at_equal_seconds"] == compared["dense-toy"]["perplexity_after"]
    equal = compared["peer-toy"]["steps_at_equal_seconds"]
    loss = compared["peer-toy"]["eval_losses"][str(equal)]
    assert compared["peer-toy"]["perplexity_at_equal_seconds"] == math.exp(loss)
    assert (f"at step {equal} of 8, with a learning rate still to fall" if equal < 8 else "no longer") in printed
    assert set(compared["peer-toy"]["expert_usage"]) == {
        f"{name}/layer_{i}" for name in ("usage", "unevenness", "top1_usage") for i in range(4)
    }
    assert "log N if one gets all" in " ".join(printed.split())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peer-toy")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template([*chat, chat[0]], tokenize=False, add_generation_prompt=True)
    assert text == "user: Hi\nassistant: Hello<|endoftext|>\nuser: Hi\nassistant:"
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "class LineReader" in printed
    assert "layer 0: " in printed
    assert str(tmp_path / "peer-toy") in printed.split("What to do next")[1]
