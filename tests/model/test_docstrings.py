# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The docstrings that Transformers completes say what they are of."""

import re

import pytest

import modeling_peer
from modeling_peer import PeerConfig, PeerForCausalLM, PeerModel
from modeling_peer.modeling_peer import PeerCausalLMOutputWithPast, PeerModelOutputWithPast


CLASSES = [PeerConfig, PeerModelOutputWithPast, PeerCausalLMOutputWithPast, modeling_peer.PeerPreTrainedModel]
CLASSES += [
    getattr(modeling_peer, name) for name in modeling_peer.__all__ if name.startswith(("PeerModel", "PeerFor"))
]


@pytest.mark.parametrize("documented", CLASSES, ids=lambda each: each.__name__)
def test_classes_name_the_model(documented):
    first_line = documented.__doc__.strip().splitlines()[0]
    assert re.match("Configuration of a PEER model|The (bare )?PEER model|Output of the|Base class of", first_line)
    assert not re.search(r"None Model|a None|\[`None`\]", documented.__doc__)
    assert not re.findall(r"https://huggingface.co/(?!docs|papers)[^)]*", documented.__doc__)


@pytest.mark.parametrize("model_class", [PeerModel, PeerForCausalLM], ids=lambda each: each.__name__)
def test_forwards_say_what_they_return(model_class):
    output = "PeerModelOutputWithPast" if model_class is PeerModel else "PeerCausalLMOutputWithPast"
    assert f"Returns:\n            [`{output}`], or a tuple" in model_class.forward.__doc__


def test_every_field_of_the_configuration_is_described():
    for name in PeerConfig.__annotations__:
        assert re.search(rf"^ *{name} \(.*\):\n +\S", PeerConfig.__doc__, re.MULTILINE), name
