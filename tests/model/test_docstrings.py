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
"""What `help` says: the model is named, and no checkpoint is linked that does not exist."""

import re

import pytest

import modeling_peer
from modeling_peer import PeerConfig, PeerForCausalLM, PeerModel
from modeling_peer.modeling_peer import PeerCausalLMOutputWithPast, PeerModelOutputWithPast


CLASSES = [PeerConfig, PeerModelOutputWithPast, PeerCausalLMOutputWithPast]
CLASSES += [
    getattr(modeling_peer, name) for name in modeling_peer.__all__ if name.startswith(("PeerModel", "PeerFor"))
]
CLASSES += [modeling_peer.PeerPreTrainedModel]


@pytest.mark.parametrize("documented", CLASSES, ids=lambda each: each.__name__)
def test_classes_name_the_model(documented):
    first_line = documented.__doc__.strip().splitlines()[0]
    assert re.match("Configuration of a PEER model|The (bare )?PEER model|Output of the|Base class of", first_line)
    assert not re.search(r"None Model|a None|\[`None`\]", documented.__doc__)
    linked = re.findall(r"https://huggingface.co/(?!docs|papers)[^)]*", documented.__doc__)
    assert not linked


@pytest.mark.parametrize("model_class", [PeerModel, PeerForCausalLM], ids=lambda each: each.__name__)
def test_forwards_say_what_they_return(model_class):
    text = model_class.forward.__doc__
    output = "PeerModelOutputWithPast" if model_class is PeerModel else "PeerCausalLMOutputWithPast"
    assert f"Returns:\n            [`{output}`], or a tuple" in text
    assert "[`None`]" not in text


def test_every_field_of_the_configuration_is_described():
    for name in PeerConfig.__annotations__:
        assert re.search(rf"^ *{name} \(.*\):\n +\S", PeerConfig.__doc__, re.MULTILINE), name
