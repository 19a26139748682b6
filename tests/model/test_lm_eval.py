# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The evaluation harness `lm_eval` on a saved PEER model, by the command on the page, with a task of this test's own: its
log-likelihoods are those that the model computes alone.
"""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from documentation import ROOT, code_blocks
from sft import save_tokenizer
from trainer_worker import PERIOD, small_model, train
from transformers import AutoTokenizer


pytest.importorskip("lm_eval", reason="lm-eval is in no extra: it installs much that the package does not need")

TASK = """
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, choice):
    """Of the tokens of a choice after those of a prompt, one sequence at a time."""
    tokens = tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids
    length = len(tokenizer(prompt).input_ids)
    log_probabilities = model(tokens).logits[0, length - 1 : -1].log_softmax(-1)
    return log_probabilities.gather(-1, tokens[0, length:, None]).sum().item()


def command_of_the_page():
    page = ROOT / "docs" / "quality.md"
    (command,) = [text for _, text in code_blocks(page, "sh") if text.startswith("lm_eval ")]
    return shlex.split(command.replace("\\\n", " "))


def test_log_likelihoods_are_those_of_the_model(tmp_path):
    model = train(small_model(), tmp_path / "run", max_steps=20).model.eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    # Prompts and answers of many lengths, so that batches are padded.
    documents = [
        {
            "prompt": " ".join(f"w{(start + i) % PERIOD}" for i in range(2 + start % 5)),
            "choices": [f"w{(start + 2 + start % 5) % PERIOD}", f"w{start} w{start}"],
            "label": 0,
        }
        for start in range(10)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "test.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "tasks" / "counting.yaml").write_text(TASK.replace("FILE", str(tmp_path / "tasks" / "test.jsonl")))

    command = " ".join(command_of_the_page()).replace("runs/clm", str(tmp_path / "model")).split()
    command[command.index("--tasks") + 1] = "counting"
    more = f"--include_path {tmp_path}/tasks --log_samples --output_path {tmp_path}/out --device cpu".split()
    done = subprocess.run([sys.executable, "-m", *command, *more], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    (samples,) = (tmp_path / "out").rglob("samples_counting_*.jsonl")
    right = 0
    for sample in map(json.loads, samples.read_text().splitlines()):
        document = sample["doc"]
        expected = [log_likelihood(model, tokenizer, document["prompt"], choice) for choice in document["choices"]]
        assert [float(found[0][0]) for found in sample["resps"]] == pytest.approx(expected, abs=1e-4)
        right += expected[0] > expected[1]
    assert right > 5
    assert float(re.search(r"acc\s*\|[^|]*\|\s*([\d.]+)\|", done.stdout)[1]) == right / len(documents)
