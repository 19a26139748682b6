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
"""Configuration of PEER grafts for PEFT."""

from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..graft_layer import LAYER_FIELDS, PLACEMENTS, peer_config_of_base_model
from .adapter_card import write_adapter_card
from .peft_releases import PEFT_TYPE_NAME, asking_for_peft, check_release


with asking_for_peft():
    from peft import PeftConfig, PeftType

check_release()


@dataclass
class PeerGraftConfig(PeftConfig):
    """
    Configuration of a [`PeerGraftModel`]: a PEER layer beside or in place of the feed-forward of chosen layers.

    PEFT fills in a configuration when an adapter is made of it, and saves it with the adapter: this one gets the
    `host_*` fields, `target_modules`, and what `"auto"` stands for. Use a new configuration for each base model.

    Args:
        placement (`str`, *optional*, defaults to `"beside"`):
            `"beside"` the feed-forward, to whose output the graft's is added, at first zero: the down-projection
            vectors of its experts start as zeros. Or `"in_place"` of the feed-forward.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indices of the layers that get a graft. Defaults to the middle one, as in the paper.
        target_modules (`str` or `list[str]`, *optional*):
            Names of the feed-forwards, as elsewhere in PEFT: a regular expression, or suffixes of names that go with
            `layers_to_transform`. Found by their linear layers if not given.
        layers_pattern (`str` or `list[str]`, *optional*):
            Name of the list of layers, if `target_modules` are suffixes of names.
        modules_to_save (`list[str]`, *optional*):
            Modules of the base model that are trained and saved besides.
        init_from_ffn (`bool`, *optional*):
            Whether experts of a graft in place of a feed-forward start as its neurons, with their biases, and all
            others with down-projection vectors of zeros. Defaults to `True` there: it was better than random experts
            at every learning rate (`./run study graft_starts`). If √N is at least 2h and at least the width of the
            feed-forward divided by h, and `scoring_func` is `"softmax"`, the router starts so that it finds the
            neurons that matter most; otherwise it starts at random.
        num_experts (`int`, *optional*, defaults to 65536):
            Experts of a graft: N, a perfect square. At least the width of the feed-forward with `init_from_ffn`.
        num_retrieval_heads (`int`, *optional*, defaults to 8):
            Query networks, h.
        num_experts_per_head (`int`, *optional*, defaults to 16):
            Experts that each head retrieves, k, at most √N.
        query_size (`int`, *optional*, defaults to 256):
            Size d_k of a query, an even number.
        query_norm (`str`, *optional*, defaults to `"rms"`):
            Normalization of queries: `"rms"`, `"batch"` as in the paper, or `None`. With `"batch"` and activation
            checkpointing, each forward pass must be followed by its backward pass.
        scoring_func (`str`, *optional*, defaults to `"softmax"`):
            How scores become router weights: `"softmax"`, `"sigmoid"` or `"relu"`.
        sub_keys_per_head (`bool`, *optional*, defaults to `False`):
            Whether each head has sub-keys of its own.
        expert_act (`str`, *optional*, defaults to `"auto"`):
            Activation of the experts, `None` for none. `"auto"` is the base model's with `init_from_ffn`, else
            `"gelu"`.
        gated_experts (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether experts are gated. `"auto"` is as in the base model's feed-forward with `init_from_ffn`, else
            `False`.
        expert_kernels (`str`, *optional*, defaults to `"auto"`):
            What computes the experts, see [`PeerConfig`]. For an existing graft, set this in its own `config`.
        host_model_type (`str`, *optional*):
            The base model's `model_type`. This and the following fields are filled in when an adapter is made. A
            configuration that is read with them describes saved weights: its grafts do not start as neurons.
        host_hidden_size (`int`, *optional*):
            Its hidden size.
        host_num_layers (`int`, *optional*):
            Its number of layers.
        host_intermediate_size (`int`, *optional*):
            The width of its feed-forwards that have a graft, of the widest if they differ.
        host_has_biases (`bool`, *optional*):
            Whether any of these has biases.

    Raises:
        `ValueError`: for a value that is not allowed, with the name of its field.

    ```python
    >>> from peft import get_peft_model
    >>> from modeling_peer import PeerGraftConfig

    >>> config = PeerGraftConfig(layers_to_transform=[15], num_experts=256**2, task_type="CAUSAL_LM")
    >>> model = get_peft_model(model, config)
    ```"""

    placement: Literal["beside", "in_place"] = "beside"
    layers_to_transform: list[int] | int | None = None
    target_modules: list[str] | str | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_from_ffn: bool | None = None
    num_experts: int = 256**2
    num_retrieval_heads: int = 8
    num_experts_per_head: int = 16
    query_size: int = 256
    query_norm: Literal["batch", "rms"] | None = "rms"
    scoring_func: Literal["softmax", "sigmoid", "relu"] = "softmax"
    sub_keys_per_head: bool = False
    expert_act: str | None = "auto"
    gated_experts: bool | Literal["auto"] = "auto"
    expert_kernels: str = "auto"
    host_model_type: str | None = field(default=None, metadata={"help": "Filled in when an adapter is made."})
    host_hidden_size: int | None = field(default=None, metadata={"help": "Filled in when an adapter is made."})
    host_num_layers: int | None = field(default=None, metadata={"help": "Filled in when an adapter is made."})
    host_intermediate_size: int | None = field(default=None, metadata={"help": "Filled in when an adapter is made."})
    host_has_biases: bool | None = field(default=None, metadata={"help": "Filled in when an adapter is made."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE_NAME)
        if self.init_from_ffn is None:
            self.init_from_ffn = self.placement == "in_place"
        self.is_of_saved_adapter = self.host_model_type is not None and self.inference_mode
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        self.check()

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As in PEFT, which calls this for each adapter that it saves; says in the adapter's card how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        write_adapter_card(save_directory, self.base_model_name_or_path, self.task_type)

    def check(self) -> None:
        """Raise `ValueError` if fields do not fit together, as the constructor does: they may have been set since."""
        if self.placement not in PLACEMENTS:
            raise ValueError(f"`placement` must be one of {PLACEMENTS}, got {self.placement!r}.")
        if self.init_from_ffn and self.placement != "in_place":
            raise ValueError(
                '`init_from_ffn` needs `placement="in_place"`, got "beside": a graft beside the feed-forward starts '
                "with an output of zero."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a regular expression.")
        layers = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        if self.layers_to_transform is not None and any(type(layer_idx) is not int for layer_idx in layers):
            raise ValueError(
                "`layers_to_transform` must be the index of a layer or a list of them, got "
                f"{self.layers_to_transform!r}."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`.")
        try:
            peer_config_of_base_model(
                PreTrainedConfig(), 2, 2, **self.layer_fields(expert_act="gelu", gated_experts=False)
            )
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def layer_fields(self, expert_act: str | None, gated_experts: bool) -> dict[str, Any]:
        """The fields that a graft shares with [`PeerConfig`], with the values that `"auto"` stands for."""
        fields = {name: getattr(self, name) for name in LAYER_FIELDS}
        if self.expert_act == "auto":
            fields["expert_act"] = expert_act
        if self.gated_experts == "auto":
            fields["gated_experts"] = gated_experts
        return fields
