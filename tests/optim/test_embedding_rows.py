# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Embeddings of any model by rows: which of them, their gradients in factors, and the state that a row has."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.experts import expert_tables, plain_weight
from modeling_peer.ops.factored_gradient import FactoredGradient


def base(tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=3, tie_word_embeddings=tied, **sizes))


def optimizer_of(model, **options):
    groups = expert_parameter_groups(model, 0.01, weight_decay=0.1, embeddings=True)
    return RowAdamW(groups, **options)


def rows_of(optimizer):
    return [parameter for group in optimizer.param_groups if group["rows"] for parameter in group["params"]]


def tokens(step, length=12):
    return torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps=5, **options):
    for step in range(steps):
        ids = tokens(step, **options)
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def test_which_embeddings():
    model = base()
    assert rows_of(optimizer_of(model)) == [model.get_input_embeddings().weight]
    assert rows_of(optimizer_of(base(tied=True))) == []
    assert not any(group["rows"] for group in expert_parameter_groups(model, 0.01))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    (weight,) = rows_of(optimizer_of(adapted))
    assert weight.requires_grad and weight is not adapted.get_base_model().model.embed_tokens.original_module.weight


@pytest.mark.parametrize("length", [12, 40])
def test_gradients_are_those_of_a_lookup(length):
    """In factors for few tokens, and dense for many; a padding token has none."""
    model = base()
    other = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    weight = model.get_input_embeddings().weight
    for step in range(2):  # accumulated
        ids = tokens(step, length)
        ids[0, 2:5] = 3
        for each in (model, other):
            each(input_ids=ids, labels=ids).loss.backward()
    assert isinstance(weight.grad, FactoredGradient) == (length == 12)
    expected = other.get_input_embeddings().weight.grad
    assert not expected[3].any() and expected.any()
    dense = weight.grad.to_rows() if length == 12 else weight.grad
    assert_close(dense, expected)
    del optimizer


def test_a_model_that_recomputes_activations_generates():
    """Transformers lets what is looked up require a gradient, also where there is none."""
    model = base()
    model.gradient_checkpointing_enable()
    optimizer = optimizer_of(model)
    with torch.no_grad():
        assert model(tokens(0)).logits.isfinite().all()
    del optimizer


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


def hooked(*sizes):
    embedding = nn.Embedding(*sizes)
    embedding.register_forward_hook(lambda module, args, output: 3 * output)
    return embedding


@pytest.mark.parametrize("make", [Scaled, hooked])
def test_more_than_a_lookup_has_a_dense_gradient(make):
    embedding = make(64, 4)
    optimizer = optimizer_of(embedding)
    embedding(torch.tensor([1, 2, 2])).sum().backward()
    assert type(embedding.weight.grad) is torch.Tensor
    assert_close(embedding.weight.grad[:4, 0], torch.tensor([0.0, 3.0, 6.0, 0.0]))
    optimizer.step()


def test_lookups_of_all_kinds():
    embedding = nn.Embedding(64, 4)
    optimizer = optimizer_of(embedding)
    output = embedding(input=torch.tensor([[1, 2], [2, 5]]))
    output.mul_(3)
    output[0, 0] = 0
    (output.sum() + embedding(torch.empty(0, dtype=torch.int64)).sum()).backward()
    gradient = embedding.weight.grad
    assert isinstance(gradient, FactoredGradient) and gradient.factors.tokens.shape[0] == 3  # of three distinct rows
    assert_close(gradient.to_rows()[:6, 0], torch.tensor([0.0, 0.0, 6.0, 0.0, 0.0, 3.0]))
    optimizer.step()


BAGS = torch.tensor([1, 2, 2, 5, 3, 1, 7, 2])


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, {"input": BAGS.view(2, 4)}),
        ({}, {"input": BAGS, "offsets": torch.tensor([0, 3, 3, 4])}),  # the second bag is empty
        ({"include_last_offset": True}, {"input": BAGS.int(), "offsets": torch.tensor([0, 3, 8]).int()}),
    ],
    ids=["matrix", "offsets", "last"],
)
def test_gradients_of_bags_in_factors(mode, padding_idx, options, inputs):
    bags = nn.EmbeddingBag(64, 4, mode=mode, padding_idx=padding_idx, **options)
    other = copy.deepcopy(bags)
    optimizer = optimizer_of(bags)
    output, expected = bags(**inputs), other(**inputs)
    assert torch.equal(output, expected)
    direction = torch.randn_like(output)
    for each in (output, expected):
        each.backward(direction)
    assert isinstance(bags.weight.grad, FactoredGradient)
    assert_close(bags.weight.grad.to_rows(), other.weight.grad)
    del optimizer


@pytest.mark.parametrize("mode", ["max", "sum"])
def test_bags_of_other_kinds_have_dense_gradients(mode):
    bags = nn.EmbeddingBag(64, 4, mode=mode)
    weights = None if mode == "max" else torch.rand(2, 4)
    optimizer = optimizer_of(bags)
    bags(BAGS.view(2, 4), per_sample_weights=weights).sum().backward()
    assert rows_of(optimizer) == [bags.weight] and type(bags.weight.grad) is torch.Tensor


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_by_name(make):
    model = nn.ModuleDict({"users": make(64, 4, sparse=True)})
    with pytest.raises(ValueError, match="the embedding 'users'.*`sparse=False`"):
        optimizer_of(model)


def test_experts_keep_their_kernels():
    model = tiny_model(tiny_config("peer", "peer"))
    optimizer = optimizer_of(model)
    assert len(rows_of(optimizer)) == 2 * 2 + 1
    assert all(plain_weight(table) is not None for table in expert_tables(model).values())


def test_a_model_of_any_output_and_its_own_list_for_ddp():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(64, 4), nn.Linear(4, 1)

        def forward(self, ids):
            return {"loss": self.linear(self.table(ids)).sum()}

    model = Model()
    model._ddp_params_and_buffers_to_ignore = ["linear.bias"]
    optimizer = optimizer_of(model)
    model(torch.tensor([1, 2]))["loss"].backward()
    assert isinstance(model.table.weight.grad, FactoredGradient)
    assert model._ddp_params_and_buffers_to_ignore == ["linear.bias", "table.weight"]
    del optimizer


def test_state_of_a_row():
    model = base()
    optimizer = optimizer_of(model, first_moment=None, second_moment="row")
    train(model, optimizer)
    (weight,) = rows_of(optimizer)
    state = optimizer.state[weight]
    assert sum(each.nbytes for each in state.values()) == 8 * len(weight)
    again = optimizer_of(copy.deepcopy(model), first_moment=None, second_moment="row")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (other,) = rows_of(again)
    assert {name: each.tolist() for name, each in again.state[other].items()} == {
        name: each.tolist() for name, each in state.items()
    }
    with pytest.raises(ValueError, match="`first_moment` must be 'full' or None, got 'row'"):
        optimizer_of(model, first_moment="row")
