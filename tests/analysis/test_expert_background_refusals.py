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
"""Background counts of what is no corpus, and counts that no corpus has, are refused."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_config
from torch.utils.data import DataLoader

from modeling_peer import ExpertBackground, PeerForCausalLM


NAME = "model.layers.1.mlp.expert_pool"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PeerForCausalLM(tiny_config("dense", "peer"))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (["text"], "Examples of `dataset` must have `input_ids`, as a tokenizer returns them, got a str: 'text'"),
        ("text", r"`dataset` must be a DataLoader or an iterable of examples, .* got 'text' \(str\)"),
        (5, r"`dataset` must be a DataLoader or an iterable of examples, .* got 5 \(int\)"),
        ({"input_ids": [1, 2]}, r"`dataset` must be .* got {'input_ids': \[1, 2\]} \(dict\)"),
        ([{"input_ids": "text"}], r"`input_ids` of an example must be token ids, .* got 'text' \(str\)"),
        ([{"input_ids": [0.5, 1.5]}], r"must be token ids, int32 or int64, got \[0.5, 1.5\] \(list\)"),
        ([{"text": "of it"}], "must have `input_ids`, .* got a dict: {'text': 'of it'}"),
        ([[1, 2, 3]], r"must have `input_ids`, .* got a list: \[1, 2, 3\]"),
        ([{"input_ids": [[1, 2]]}], r"`input_ids` of an example must be those of one sequence, got shape \(1, 2\)"),
        ([{"input_ids": 3}], r"must be those of one sequence, got shape \(\)"),
        (DataLoader([torch.arange(3)]), "Batches of `dataset` must be arguments of the model by name, got a Tensor"),
    ],
)
def test_what_is_no_corpus_is_refused(model, dataset, message):
    with pytest.raises(ValueError, match=message):
        ExpertBackground.measure(model, dataset, progress_bar=False)


@pytest.mark.parametrize(
    ("counts", "num_documents", "message"),
    [
        (torch.tensor([0, -2, 1, -1]), 3, r"must be from 0 to `num_documents` = 3, got 2 others, such as \[-2, -1\]"),
        (torch.tensor([0, 4]), 3, r"must be from 0 to `num_documents` = 3, got 1 others, such as \[4\]"),
        (
            torch.tensor([0.0, 1.0]),
            3,
            r"must be integers of shape \(num_experts,\), got torch.float32 of shape \(2,\)",
        ),
        (torch.tensor([[0, 1]]), 3, r"must be integers of shape \(num_experts,\), got torch.int64 of shape \(1, 2\)"),
    ],
)
def test_counts_that_no_corpus_has_are_refused(tmp_path, counts, num_documents, message):
    with pytest.raises(ValueError, match=rf"`document_counts\['{NAME}'\]` {message}"):
        ExpertBackground({NAME: counts}, num_documents)
    metadata = {"format": "pt", "num_documents": str(num_documents)}
    save_file({f"document_counts.{NAME}": counts}, tmp_path / "expert_background.safetensors", metadata)
    with pytest.raises(
        ValueError, match=rf"expert_background.safetensors has no valid counts: `document_counts.* {message}"
    ):
        ExpertBackground.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": [1]}, r"`document_counts\['a'\]` must be a tensor of integers of shape .*, got \[1\] \(list\)"),
        ([1], r"`document_counts` must be tensors by name, got \[1\] \(list\)"),
    ],
)
def test_counts_that_are_no_tensors_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        ExpertBackground(counts, 3)


@pytest.mark.parametrize("num_documents", [-1, 2.0, True, None])
def test_numbers_of_documents_are_refused(num_documents):
    with pytest.raises(ValueError, match=f"`num_documents` must be an integer of at least 0, got {num_documents!r}"):
        ExpertBackground({NAME: torch.zeros(2, dtype=torch.int64)}, num_documents)
