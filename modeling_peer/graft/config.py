# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of PEER grafts for PEFT."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftType
from transformers import PreTrainedConfig

from ..arguments.check_types import check_type
from ..graft_layer import LAYER_FIELDS, peer_config_of_base_model
from .card import write_adapter_card
from .registration import PEFT_TYPE_NAME


@dataclass
class PeerGraftConfig(PeftConfig):
    """
    Configuration of a [`PeerGraftModel`]: a PEER layer beside or in place of the feed-forward of chosen layers.

    When PEFT makes an adapter, it fills in fields of the configuration and saves it with the adapter: the `host_*`
    fields, `target_modules`, and the values that `"auto"` stands for. Use a new configuration for each base model.

    Args:
        placement (`str`, *optional*, defaults to `"beside"`):
            `"beside"` adds the output of the graft to that of the feed-forward. It is zero at first, as the
            down-projection vectors of experts start as zeros. `"in_place"` replaces the feed-forward.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indices of the layers that get a graft. Defaults to the middle one, as in the paper.
        target_modules (`str` or `list[str]`, *optional*):
            Names of the feed-forwards, as elsewhere in PEFT: a regular expression, or suffixes of names to combine
            with `layers_to_transform`. If not given, feed-forwards are recognized by their linear layers.
        layers_pattern (`str` or `list[str]`, *optional*):
            Name of the list of layers, if `target_modules` are suffixes of names.
        modules_to_save (`list[str]`, *optional*):
            Modules of the base model that are trained and saved too.
        init_from_ffn (`bool`, *optional*):
            Whether experts of a graft in place of a feed-forward start as its neurons, with their biases. All other
            experts start with down-projection vectors of zeros. Anything else in the feed-forward is not copied.
            Defaults to `True` in place: it was better than random experts at every learning rate
            (`./run study graft_starts`). The router starts so that it finds the neurons that matter most if
            `scoring_func` is `"softmax"`, √N is at least 2h and at least the width of the feed-forward divided by h,
            and h is less than `query_size / 2`. Otherwise it starts at random.
        num_experts (`int`, *optional*, defaults to 65536):
            Number N of experts of a graft, a perfect square. With `init_from_ffn`, at least the feed-forward's width.
        num_retrieval_heads, num_experts_per_head, query_size, scoring_func, sub_keys_per_head (*optional*):
            As in [`PeerConfig`].
        query_norm (`str`, *optional*, defaults to `"rms"`):
            Normalization of queries: `"rms"`, `"batch"` as in the paper, or `None`. With activation checkpointing and
            `"batch"` or a graft of facts, each forward pass must be followed by its backward pass.
        expert_act (`str`, *optional*, defaults to `"auto"`):
            Activation of the experts, or `None` for no activation. `"auto"` is that of the base model with
            `init_from_ffn`, otherwise `"gelu"`.
        gated_experts (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether experts are gated. `"auto"` is as in the base model's feed-forward with `init_from_ffn`, else
            `False`.
        expert_kernels (`str`, *optional*, defaults to `"auto"`):
            Implementation of the experts, see [`PeerConfig`]. For an existing graft, set this in its own `config`.
        has_gate (`bool`, *optional*, defaults to `False`):
            Whether a gate decides which tokens use a graft beside the feed-forward. It is open until [`fit_gates`]
            fits it.
        fact_sizes (`dict`, *optional*):
            The fields of [`FactSizes`] for a graft of facts, as [`teach_facts`] makes it: its experts hold the
            answers of facts, and a gate opens only where one of these facts is asked for.
        facts (`list[dict]`, *optional*):
            The `subject`, `question`, `answer` and `num_experts` of each fact, in the order of their experts.
        host_model_type, host_hidden_size, host_num_layers, host_intermediate_size, host_has_biases (*optional*):
            The base model's `model_type` and sizes, the width of its widest feed-forward that has a graft, and whether
            any of these has biases. Filled in when an adapter is made. If a configuration is loaded with these fields,
            saved weights follow, so its grafts do not start as neurons.

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
    target_modules: list[str] | set[str] | str | None = None
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
    has_gate: bool = False
    fact_sizes: dict[str, int] | None = None
    facts: list[dict[str, Any]] | None = None
    host_model_type: str | None = None
    host_hidden_size: int | None = None
    host_num_layers: int | None = None
    host_intermediate_size: int | None = None
    host_has_biases: bool | None = None

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
        """Save as in PEFT, which calls this for each saved adapter, and write into its card how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        write_adapter_card(save_directory, self.base_model_name_or_path, self.task_type)

    def check(self) -> None:
        """
        Raise `TypeError` for a field of another type, and `ValueError` if fields do not fit together. Called again
        later, as fields may be set after init.
        """
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        if self.placement not in ("beside", "in_place"):
            raise ValueError(f"`placement` must be 'beside' or 'in_place', got {self.placement!r}.")
        for name in ("fact_sizes", "has_gate"):
            if getattr(self, name) and self.placement != "beside":
                raise ValueError(f'`{name}` needs `placement="beside"`, got {self.placement!r}.')
        if self.init_from_ffn and self.placement != "in_place":
            raise ValueError('`init_from_ffn` needs `placement="in_place"`, got "beside", which starts at zero.')
        try:
            peer_config_of_base_model(
                PreTrainedConfig(), 2, 2, **self.layer_fields(expert_act="gelu", gated_experts=False)
            )
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    @property
    def starts_as_neurons(self) -> bool:
        """Whether the experts of a new graft start as neurons, which they do not if saved weights follow."""
        return self.init_from_ffn and not self.is_of_saved_adapter

    def layer_fields(self, expert_act: str | None, gated_experts: bool) -> dict[str, Any]:
        """The fields that a graft shares with [`PeerConfig`], with the values that `"auto"` stands for."""
        fields = {name: getattr(self, name) for name in LAYER_FIELDS}
        if self.expert_act == "auto":
            fields["expert_act"] = expert_act
        if self.gated_experts == "auto":
            fields["gated_experts"] = gated_experts
        return fields
