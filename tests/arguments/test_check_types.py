# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments that are wrong end in an error that names them, before anything changes."""

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from graft_models import BASE_MODELS
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from tiny_models import random_tokens, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import modeling_peer as peer
from modeling_peer.arguments.check_types import check_types


@check_types
def function(
    model: nn.Module,
    number: int = 1,
    rate: float | None = None,
    names: str | Iterable[str] = (),
    layers: Iterable[int] | torch.Tensor | int | None = None,
    kind: Literal["a", "b"] = "a",
    later: "Later" = None,  # type: ignore[name-defined]  # noqa: F821
    anything: Any = None,
    untyped=None,
    **others: int,
):
    """A function with all kinds of annotations."""
    return number


MODEL = nn.Linear(1, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"number": np.int64(3), "rate": 1},
        {"rate": np.float32(0.5), "names": "a", "layers": range(3)},
        {
            "names": ["a"],
            "layers": iter([1]),
            "kind": "b",
            "later": type("Later", (), {})(),
            "anything": object(),
            "untyped": {},
        },
        {"layers": torch.tensor([1]), "other": "x"},
        {"layers": np.arange(3)},
    ],
)
def test_arguments_of_their_types_pass(arguments):
    assert function(MODEL, **arguments) == arguments.get("number", 1)
    assert function.__doc__.startswith("A function")


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": None},
        {"number": 1.0},
        {"number": True},
        {"rate": "1"},
        {"names": [1]},
        {"names": 1},
        {"layers": "12"},
        {"layers": 1.5},
        {"layers": [1, 1.5]},
        {"layers": {0: 1}},
        {"later": 1},
        {"kind": 1},
    ],
)
def test_arguments_of_other_types_are_named(arguments):
    (name,) = arguments
    with pytest.raises(TypeError, match=f"`{name}` must be of type .*, got .* of type"):
        function(**{"model": MODEL} | arguments)


def of_peer():
    return tiny_model(tiny_config("peer", "pkm", bos_token_id=1))


def adapter_config(**fields):
    sizes = {"num_experts": 36, "num_retrieval_heads": 2, "num_experts_per_head": 3, "query_size": 8}
    return peer.PeerGraftConfig(**sizes, task_type="CAUSAL_LM", **fields)


def padded(*shape):
    return torch.ones(shape, dtype=torch.long).index_fill(1, torch.tensor([0]), 0)


ARGUMENTS = TrainingArguments(learning_rate=1e-3, use_cpu=True)
TEXT = [{"input_ids": [1, 2, 3]}] * 4


COUNTS = {"model.layers.0.mlp.expert_pool": torch.tensor([1, 2])}

# A call on a model, and what its error has to name.
BAD_CALLS = [
    (lambda model: model(random_tokens(2, 5), attention_mask=padded(3, 5)), r"attention_mask.*\(2, 5\).*\(3, 5\)"),
    (lambda model: model(random_tokens(2, 5), attention_mask=padded(2, 3)), r"attention_mask.*\(2, 5\).*\(2, 3\)"),
    (lambda model: peer.freeze_experts(model, -1), "`experts` must be from 0 to 35.*got -1"),
    (lambda model: peer.freeze_experts(model, [3, 300]), "`experts` must be from 0 to 35.*got 300"),
    (lambda model: peer.freeze_experts(model, torch.ones(3).bool()), r"shape \(36,\), got torch.bool of shape \(3,\)"),
    (lambda model: peer.freeze_experts(model, torch.ones(3)), "`experts`.*float32"),
    (lambda model: peer.freeze_experts(model, 1.5), "`experts`.*1.5"),
    (lambda model: peer.freeze_experts(model, layers="0"), "`layers`.*'0'"),
    (lambda model: peer.freeze_experts(model, used_in=COUNTS), "`used_in`.*ExpertBackground"),
    (lambda model: peer.freeze_experts(model, min_documents=0), "`min_documents`.*got 0"),
    (lambda model: peer.masked_experts(model).__enter__(), "`experts` must name the experts to mask"),
    (lambda model: peer.masked_experts(model, 300).__enter__(), "`experts`.*got 300"),
    (lambda model: peer.model_costs({}), "`config`.*PeerConfig"),
    (lambda model: peer.model_costs(model.config, -1), "`sequence_length`.*got -1"),
    (lambda model: peer.ExpertBackground(COUNTS, 1), "`document_counts` of model.layers.0.*`num_documents`"),
    (lambda model: peer.ExpertBackground({"a": torch.tensor([-1])}, 1), "`document_counts` of a"),
    (lambda model: peer.ExpertBackground(COUNTS, "1"), "`num_documents`.*'1'"),
    (lambda model: peer.SparseFinetuningCallback(model, COUNTS), "`background`.*ExpertBackground"),
    (lambda model: peer.keep_heads(model, True), "`num_heads`.*bool"),
    (lambda model: peer.keep_heads(model, 1.5), "`num_heads`.*1.5"),
    (lambda model: peer.keep_heads(model, None), "`num_heads`.*None"),
    (lambda model: peer.quantize_experts(model, 8.0), "`bits`.*8.0"),
    (lambda model: peer.PeerQuantizationConfig("8"), "`bits`.*'8'"),
    (lambda model: peer.freeze_query_norm(None), "`model`.*None"),
    (lambda model: peer.explain_tokens(model, None, "a"), "`tokenizer`.*None"),
    (lambda model: peer.ExpertUsageMeter("5"), "`num_experts`.*'5'"),
    (lambda model: peer.SplitCheckpointCallback(5), "`resume_from_checkpoint`.*5"),
    (lambda model: peer.PeerQuantizationConfig(8, "8"), "`group_size`.*'8'"),
    (lambda model: peer.keep_tables_on_disk(model, "64MB"), "`buffer_bytes`.*'64MB'"),
    (lambda model: peer.keep_tables_on_disk(model, 0), "`buffer_bytes`.*got 0"),
    (lambda model: peer.add_experts(model, 16.0), "`num_experts`.*16.0"),
    (lambda model: peer.generate_text(model, 0, 5), "`num_sequences`.*got 0"),
    (lambda model: peer.shard_experts(model, "2"), "`ep_size`.*'2'"),
    (lambda model: peer.host_table_device_map(None, model.config, 0), "`model_class`.*None"),
    (lambda model: peer.make_optimizer(model, 1e-3), "`args`.*TrainingArguments.*0.001"),
    (lambda model: peer.make_split_model("PeerForCausalLM", model.config), "`model_class`.*'PeerForCausalLM'"),
    (lambda model: peer.make_optimizer(model, ARGUMENTS, -1.0), "`expert_lr_multiplier`.*got -1.0"),
    (lambda model: peer.make_optimizer(model, ARGUMENTS, 1.0, float("nan")), "`down_proj_lr_multiplier`.*got nan"),
    (lambda model: peer.last_complete_checkpoint(None), "`output_dir`.*None"),
    (lambda model: peer.ExpertUsageMeter(9).update(torch.ones(1, 1), torch.ones(1, 1)), "`indices`.*float32"),
    (lambda model: peer.measure_usage(model, random_tokens(1, 5)), r"measure_usage\(\) takes 1 positional"),
    (lambda model: peer.measure_usage(None), "`model`.*None"),
    (lambda model: peer.dequantize_experts(None), "`model`.*None"),
    (lambda model: peer.dequantize_experts(model, torch.int8), "`dtype`.*torch.int8"),
    (lambda model: peer.keep_heads(model.model.layers, 1), "`model`.*PeerPreTrainedModel"),
    (lambda model: peer.masked_experts(model, {0: [1]}).__enter__(), "`experts`.*dict"),
    (lambda model: peer.ExpertBackground.measure(model, ["hello"]), "`input_ids`.*'hello'"),
    (lambda model: peer.ExpertBackground.measure(model, [{"input_ids": [[1, 2]]}]), "`input_ids`.*sequence_length"),
    (lambda model: peer.ExpertBackground.measure(model, [{"text": "a"}]), "`input_ids`.*'text'"),
    (lambda model: peer.ExpertBackground.measure(model, {"train": TEXT}), "Examples.*got a dict"),
    (lambda model: peer.ExpertBackground({"a": torch.ones(3)}, 2), "`document_counts` of a.*integers.*float32"),
    (lambda model: peer.fit_gates(None, TEXT, TEXT), "`model`.*None"),
    (lambda model: peer.fit_gates(model, TEXT, TEXT, num_steps=0), "`num_steps`.*got 0"),
    (lambda model: peer.fit_gates(model, TEXT, TEXT, reference_weight=float("nan")), "`reference_weight`.*nan"),
    (lambda model: adapter_config(layers_to_transform="1"), "`layers_to_transform`.*'1'"),
]


@pytest.mark.parametrize("call, named", BAD_CALLS, ids=[named for _, named in BAD_CALLS])
def test_bad_arguments_are_named_and_change_nothing(call, named):
    model = of_peer()
    state, config = copy.deepcopy(model.state_dict()), model.config.to_json_string()
    with pytest.raises((TypeError, ValueError), match=f"(?s){named}"):
        call(model)
    assert model.config.to_json_string() == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_table_that_cannot_be_quantized_leaves_all_as_they_were():
    model = of_peer()
    model.model.layers[1].mlp.values.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match="layers.1.mlp.values"):
        peer.quantize_experts(model)
    assert isinstance(model.model.layers[0].mlp.expert_pool.up_proj, nn.Embedding)


@pytest.mark.parametrize("field", ["attention_dropout", "classifier_dropout"])
def test_rates_of_dropout(field):
    with pytest.raises(StrictDataclassError, match=f"(?s)`{field}`.*at most 1, got 1.5"):
        tiny_config("peer", **{field: 1.5})


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_experts_to_train_are_a_positive_number(number):
    model = of_peer()
    background = peer.ExpertBackground.measure(model, [{"input_ids": [1, 2, 3]}], progress_bar=False)
    with pytest.raises((TypeError, ValueError), match=f"`num_trained_experts`.*got {number}"):
        peer.SparseFinetuningCallback(model, background, number)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sizes_that_a_checkpoint_fixes(tmp_path):
    of_peer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other sizes than {'num_retrieval_heads': 4}.*keep_heads"):
        peer.PeerForCausalLM.from_pretrained(tmp_path, num_retrieval_heads=4)
    assert peer.PeerForCausalLM.from_pretrained(tmp_path, num_experts_per_head=2).config.num_experts_per_head == 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tables are kept on a disk on Linux only")
def test_a_model_on_a_disk_is_not_pickled(tmp_path):
    of_peer().save_pretrained(tmp_path)
    model = peer.PeerForCausalLM.from_pretrained(tmp_path)
    peer.keep_tables_on_disk(model)
    with pytest.raises(TypeError, match="tables on a disk cannot be pickled"):
        pickle.dumps(model)


class TestGrafts:
    @pytest.mark.parametrize("name", ["a.b", "", "router"])
    def test_names_of_adapters(self, name):
        base = AutoModelForCausalLM.from_config(BASE_MODELS["llama"])
        with pytest.raises(ValueError, match=f"`adapter_name`.*got {name!r}"):
            get_peft_model(base, adapter_config(), name)

    def test_an_adapter_of_another_base_model(self, tmp_path):
        get_peft_model(AutoModelForCausalLM.from_config(BASE_MODELS["llama"]), adapter_config()).save_pretrained(
            tmp_path
        )
        with pytest.raises(ValueError, match="`host_model_type` = 'llama', this one has 'gpt2'"):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_config(BASE_MODELS["gpt2"]), tmp_path)

    def test_what_cannot_be_merged_into_weights(self):
        model = get_peft_model(AutoModelForCausalLM.from_config(BASE_MODELS["llama"]), adapter_config())
        for call in (model.merge_adapter, model.unmerge_adapter):
            with pytest.raises(NotImplementedError, match="merge_and_unload"):
                call()


class TestVariants:
    """A feed-forward of one's own is refused where it is registered, not in the first forward."""

    class Variant(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    class OfOneArgument(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    def test_must_take_what_layers_pass(self):
        with pytest.raises(ValueError, match=r"`forward` of OfOneArgument must take `\*\*kwargs`"):
            peer.FeedForwardInterface.register("one_argument", self.OfOneArgument)

    def test_replaces_no_other(self):
        with pytest.raises(ValueError, match="'peer' is the name of PeerFeedForward already"):
            peer.FeedForwardInterface.register("peer", self.Variant)
        for _ in range(2):  # a cell of a notebook may run again
            peer.FeedForwardInterface.register("variant_of_a_test", self.Variant)
