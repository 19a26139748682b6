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
"""Which label ids a classifier trains with and is evaluated by, where the labels of the data are not those of it."""

import json
import sys

import datasets
import pytest
import run_classification
import torch
from run_classification import ClassifierArguments, load_labeled_config
from tiny_models import tiny_config

from common.command_line import UsageError
from common.library_sources import byte_level_tokenizer
from modeling_peer import PeerForSequenceClassification


LABELS = {0: "c", 1: "a", 2: "b"}
TEXTS = [f"{i * 7919} and {i % 13}" for i in range(150)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folder of a classifier of random weights, and what it says of each text."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = byte_level_tokenizer(TEXTS, 300, 512)
    config = tiny_config("peer", "dense", vocab_size=300, pad_token_id=tokenizer.pad_token_id, id2label=LABELS)
    torch.manual_seed(0)
    model = PeerForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        scores = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    return folder, [LABELS[label] for label in scores.argmax(-1).tolist()]


def test_evaluation_keeps_the_label_ids_of_the_model(classifier, tmp_path, monkeypatch):
    """Labels that are the model's own answers are all right, also if the data lacks one that the model knows."""
    folder, answers = classifier
    rows = [f"{text},{answer}" for text, answer in zip(TEXTS, answers, strict=True) if answer != "c"]
    assert {row[-1] for row in rows} == {"a", "b"}
    (tmp_path / "held_out.csv").write_text("\n".join(["text,label", *rows]))
    flags = ("--model_name_or_path", folder, "--validation_file", tmp_path / "held_out.csv", "--do_eval")
    flags += ("--output_dir", tmp_path / "evaluated", "--report_to", "none", "--use_cpu")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(run_classification, "setup_logging", lambda training_args: None)  # would outlast the test
    monkeypatch.setattr(sys, "argv", ["run_classification.py", *map(str, flags)])
    run_classification.main()
    results = json.loads((tmp_path / "evaluated" / "all_results.json").read_text())
    assert (results["eval_accuracy"], results["eval_samples"]) == (1.0, len(rows))


def test_labels_that_the_model_does_not_know_are_trained_or_refused(classifier):
    """As many of them too, which have other names."""
    args = ClassifierArguments(model_name_or_path=str(classifier[0]))
    message = r"some of those of the model, \['c', 'a', 'b'\], but they are \['a', 'b', 'd'\]: choose .* --do_train"
    with pytest.raises(UsageError, match=message):
        load_labeled_config(args, ["a", "b", "d"], is_trained=False)
    config = load_labeled_config(args, ["a", "b", "d"], is_trained=True)
    assert (config.id2label, config.label2id) == ({0: "a", 1: "b", 2: "d"}, {"a": 0, "b": 1, "d": 2})
    config = load_labeled_config(args, ["b", "c"], is_trained=True)
    assert (config.id2label, config.label2id) == (LABELS, {"c": 0, "a": 1, "b": 2})
    config = load_labeled_config(ClassifierArguments(config_name="peer-tiny"), ["LABEL_1", "LABEL_0"], is_trained=True)
    assert (config.num_labels, config.id2label) == (2, {0: "LABEL_1", 1: "LABEL_0"})


def test_a_classifier_of_other_labels_gets_a_new_output_layer_when_asked_to(classifier, tmp_path, monkeypatch):
    folder = classifier[0]
    with pytest.raises(UsageError, match=r"tells 3 labels apart, .* are 2, \['d', 'e'\]: .*--ignore_mismatched_sizes"):
        load_labeled_config(ClassifierArguments(model_name_or_path=str(folder)), ["d", "e"], is_trained=True)
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *(f"{text},{'de'[len(text) % 2]}" for text in TEXTS)]))
    flags = ("--model_name_or_path", folder, "--train_file", tmp_path / "data.csv", "--do_train", "--max_steps", 1)
    flags += ("--output_dir", tmp_path / "trained", "--report_to", "none", "--use_cpu", "--ignore_mismatched_sizes")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(run_classification, "setup_logging", lambda training_args: None)  # would outlast the test
    monkeypatch.setattr(sys, "argv", ["run_classification.py", *map(str, flags)])
    run_classification.main()
    model = PeerForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert (model.config.id2label, model.score.weight.shape[0]) == ({0: "d", 1: "e"}, 2)
