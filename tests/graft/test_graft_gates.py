# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A trained graft behind a gate: where this is shut the base model is as it was, and it is saved and merged with the graft."""

import pytest
import torch
from graft_models import assert_refused, base_model_of, graft_config, grafted, grafts_of, logits_of, trained
from peft import PeftModel
from trainer_worker import copy_of_state
from transformers import AutoModelForCausalLM

from modeling_peer import fit_gates


def text(first_token, number=100):
    """Sequences of twenty neighboring tokens, told apart by no other."""
    tokens = torch.randint(first_token, first_token + 20, (number, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": sequence} for sequence in tokens]


NEW, REFERENCE = text(1), text(40)
TOKENS = torch.stack([each["input_ids"] for each in REFERENCE])


def fit(model, new=NEW, reference=REFERENCE):
    return fit_gates(model, new, reference, reference_weight=16, num_steps=200, progress_bar=False)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_decides_which_tokens_the_graft_changes():
    model = grafted(has_gate=True)
    state, learns = copy_of_state(model), trainable(model)
    (result,) = (fits := fit(model)).values()
    assert [*fits] == ["layer_1_default"] and result.open_for_new > 0.5 > 0.05 > result.open_for_reference
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert len(changed) == 4 and all(".router.gate." in name for name in changed)
    assert learns == trainable(model) and not learns & changed  # training leaves the gate as it was fitted
    (graft,) = grafts_of(trained(model))
    inputs = []
    graft.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    taught = logits_of(model, TOKENS)
    with model.disable_adapter():
        original = logits_of(model, TOKENS)
    # At a token and at all before, which it attends to.
    shut = (graft.router.gate(inputs[0]) == 0)[..., 0].cummin(-1).values
    assert shut.float().mean() > 0.2 and torch.equal(taught[shut], original[shut])
    assert not torch.equal(taught, original)


def test_is_saved_and_merged_with_the_graft(tmp_path):
    model = grafted(has_gate=True)
    fit(model)
    expected = logits_of(trained(model), TOKENS)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model_of(), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, TOKENS), expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(merged, TOKENS), expected)
    assert [*fit(again := grafted(merged, has_gate=True), REFERENCE, NEW)] == ["layer_1_default"]
    assert torch.equal(logits_of(again, TOKENS), expected)  # the merged gate is as it was


def test_is_fitted_for_active_adapters_alone():
    model = grafted(has_gate=True)
    model.add_adapter("second", graft_config(has_gate=True))
    model.set_adapter("second")
    state = copy_of_state(model)
    assert [*fit(model)] == ["layer_1_second"]
    assert not [name for name in trainable(model) if ".default." in name or ".gate." in name]
    first = [name for name in state if ".default." in name]
    assert first and all(torch.equal(model.state_dict()[name], state[name]) for name in first)


def test_is_not_there_unless_asked_for():
    with pytest.raises(ValueError, match="has_gate"):
        fit(grafted())
    with pytest.raises(ValueError, match="has_gate"):
        graft_config(has_gate=True, placement="in_place")
    config = graft_config(placement="in_place", init_from_ffn=False)
    config.has_gate = True
    assert_refused(base_model_of(), config, "has_gate")
