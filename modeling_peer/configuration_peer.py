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
"""Configuration of PEER models."""

# Before all else: it refuses releases of Transformers and torch whose names the imports below may not find.
from .library_releases import check_releases as check_releases


# isort: split

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import auto_docstring

from .expert_additions import check_additions
from .key_grid import grid_size


FORMAT_VERSION = 1

AUTO_MAP = {
    "AutoConfig": "configuration_peer.PeerConfig",
    "AutoModel": "modeling_peer.PeerModel",
    "AutoModelForCausalLM": "modeling_peer.PeerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_peer.PeerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_peer.PeerForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_peer.PeerForQuestionAnswering",
}


INTRODUCTION = r"""
    Configuration of a PEER model: a Llama-style decoder whose layers take their feed-forward from a registry of
    variants. The defaults are those of the paper, Xu Owen He, "Mixture of A Million Experts" ([arXiv
    2407.04153](https://arxiv.org/abs/2407.04153)): one layer of 1024² = 1,048,576 experts in the middle of 12. Small
    models learn better with experts in every layer, as in the example below and in the configuration `"peer-toy"` of
    [`configuration_path`], which have fewer of them.

    Configuration objects inherit from [`PreTrainedConfig`], see there for fields and methods that all models have.
    Fields are checked when a configuration is made, loaded and saved, and when a model is built of it: a wrong value
    raises a `StrictDataclassError` that names the field, what was found and what was expected.
    """


@auto_docstring(custom_intro=INTRODUCTION)
@strict
class PeerConfig(PreTrainedConfig):
    r"""
    feed_forward_types (`list[str]`, *optional*):
        The feed-forward variant of each layer: `"dense"`, `"moe"`, `"pkm"`, `"peer"`, or a name registered with
        [`FeedForwardInterface`]. Defaults to `"peer"` in the middle layer and `"dense"` in the others, as in the
        paper.
    num_experts (`int`, *optional*, defaults to 1048576):
        Number N of experts of a PEER layer, or of values of a PKM layer, a perfect square.
    num_retrieval_heads (`int`, *optional*, defaults to 8):
        Number h of query networks of a layer. A trained checkpoint may be loaded with fewer.
    num_experts_per_head (`int`, *optional*, defaults to 16):
        Number k of experts that each head retrieves, at most √N. A trained checkpoint may be loaded with more or
        fewer.
    query_size (`int`, *optional*, defaults to 256):
        Size d_k of a query, an even number: each half is compared with one of the two sets of sub-keys.
    query_norm (`str`, *optional*, defaults to `"batch"`):
        Normalization of queries: `"batch"` over tokens, as in the paper (see [`QueryBatchNorm`] for what it means for
        causality in training), `"rms"` of each half of queries and keys, or `None`.
    scoring_func (`str`, *optional*, defaults to `"softmax"`):
        Function that turns a head's retrieved scores into router weights: `"softmax"`, `"sigmoid"` or `"relu"`.
    sub_keys_per_head (`bool`, *optional*, defaults to `False`):
        Whether each head has its own sub-keys. In the paper all heads share them.
    expert_act (`str`, *optional*, defaults to `"gelu"`):
        Activation σ of the experts, or `None` for none.
    expert_initializer_range (`float`, *optional*):
        Standard deviation of the initial down-projection vectors v_i of PEER experts, and of the values of PKM. If
        `None`, it is the one that gives the output of the layer the variance of a dense feed-forward's: up to k times
        `initializer_range`, as the router weights of a head sum to one. A smaller value leaves less noise to unlearn.
    gated_experts (`bool`, *optional*, defaults to `False`):
        Whether experts are gated: σ(w_i · x) (u_i · x) v_i.
    share_experts_across_layers (`bool`, *optional*, defaults to `False`):
        Whether all PEER layers retrieve from one pool of experts, held by the base model, each with its own router.
    shared_expert_intermediate_size (`int`, *optional*):
        Width of a dense branch beside the experts of a PEER layer. No branch if `None`.
    expert_kernels (`str`, *optional*, defaults to `"auto"`):
        Kernels that retrieve and compute the experts of PEER and PKM layers: `"auto"`, the fastest that can run on the
        device of the experts; `"eager"` (the literal Algorithm 1), `"torch"`, `"cpu"` (C) or `"triton"` (GPU); or a
        name registered with [`ExpertKernelsInterface`]. Results do not depend on it.
    expert_additions (`list[dict]`, *optional*):
        Experts that [`add_experts`] added to PEER layers, in that order: the `layers`, `mode` and `num_experts` of
        each addition, and `num_retrieval_heads` and `num_experts_per_head` of a protected one. The fields of these
        names above remain those of the first experts of a layer, also where they are changed at load.
    moe_num_experts (`int`, *optional*, defaults to 128):
        Number of experts of a MoE layer.
    moe_num_experts_per_tok (`int`, *optional*, defaults to 2):
        Number of experts of a MoE layer that a token uses.
    moe_intermediate_size (`int`, *optional*):
        Width of an expert of a MoE layer. Defaults to `intermediate_size // moe_num_experts_per_tok`, which takes as
        many FLOPs as the dense feed-forward.
    moe_routing (`str`, *optional*, defaults to `"token_choice"`):
        Who chooses in training: `"token_choice"` or `"expert_choice"`, see [`MoeFeedForward`].
    router_aux_loss_coef (`float`, *optional*):
        Weight of the load-balancing loss of MoE layers, which is computed if `output_router_logits` is true. Defaults
        to 0.001 with MoE layers and to zero without: PEER and PKM are balanced by their query norm. A checkpoint keeps
        the value that it was saved with.
    output_router_indices (`bool`, *optional*, defaults to `False`):
        Whether to return the indices of the experts that PEER, PKM and MoE layers retrieved.
    output_router_weights (`bool`, *optional*, defaults to `False`):
        Whether to return the router weights of these experts.
    format_version (`int`, *optional*, defaults to 1):
        Version of the checkpoint format. A later version than the code knows is refused.

    ```python
    >>> from modeling_peer import PeerConfig, PeerModel

    >>> # A small PEER model: 4 layers with 4096 experts each
    >>> configuration = PeerConfig(
    ...     hidden_size=128,
    ...     num_attention_heads=4,
    ...     num_hidden_layers=4,
    ...     feed_forward_types=["peer"] * 4,
    ...     num_experts=64**2,
    ...     num_retrieval_heads=2,
    ...     num_experts_per_head=32,
    ...     query_size=64,
    ...     sub_keys_per_head=True,
    ...     expert_initializer_range=0.1,
    ... )

    >>> # Initializing a model (with random weights) from the configuration
    >>> model = PeerModel(configuration)

    >>> # Accessing the model configuration
    >>> configuration = model.config
    ```"""

    model_type = "peer"

    # Of what every model has; each feed-forward variant has a plan of its own, which the model adds.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    feed_forward_types: list[str] | None = None
    num_experts: int = 1024**2
    num_retrieval_heads: int = 8
    num_experts_per_head: int = 16
    query_size: int = 256
    query_norm: Literal["batch", "rms"] | None = "batch"
    scoring_func: Literal["softmax", "sigmoid", "relu"] = "softmax"
    sub_keys_per_head: bool = False
    expert_act: str | None = "gelu"
    expert_initializer_range: float | None = None
    gated_experts: bool = False
    share_experts_across_layers: bool = False
    shared_expert_intermediate_size: int | None = None
    expert_kernels: str = "auto"
    expert_additions: list[dict[str, Any]] | None = None
    moe_num_experts: int = 128
    moe_num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    moe_routing: Literal["token_choice", "expert_choice"] = "token_choice"
    output_router_logits: bool = False
    output_router_indices: bool = False
    output_router_weights: bool = False
    router_aux_loss_coef: float | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size // max(self.moe_num_experts_per_tok, 1)
        if self.feed_forward_types is None:
            middle = (self.num_hidden_layers - 1) // 2
            self.feed_forward_types = ["peer" if i == middle else "dense" for i in range(self.num_hidden_layers)]
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.001 if "moe" in self.feed_forward_types else 0.0
        if self.expert_kernels == "native":  # its name in the checkpoints of earlier releases
            self.expert_kernels = "cpu"
        kwargs.pop("sparse_expert_gradients", None)  # of earlier releases: the optimizer decides
        # All classes, without the repository that a remote copy came from: every checkpoint carries the code itself.
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As in Transformers. Values that `kwargs` override are validated as well.

        Raises:
            `ValueError`: also if `kwargs` raise `num_retrieval_heads`, as a checkpoint has no query networks for more
                heads than it was trained with.
        """
        trained_heads = config_dict.get("num_retrieval_heads")
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate()
        if trained_heads is not None and config.num_retrieval_heads > trained_heads:
            raise ValueError(
                f"`num_retrieval_heads` can be lowered at load, not raised: the checkpoint has {trained_heads} query "
                f"networks, got {config.num_retrieval_heads}. For a new model set it on the loaded configuration."
            )
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, without the expert parallel plan: no plan is part of a checkpoint."""
        fields = super().to_dict()
        fields.pop("base_model_ep_plan", None)
        return fields

    @property
    def num_experts_per_tok(self) -> int:
        """Number of active experts per token, h · k, under the name that serving engines look for."""
        return self.num_retrieval_heads * self.num_experts_per_head

    def validate_format_version(self):
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"`format_version` is {self.format_version}, and this code reads versions 1 to {FORMAT_VERSION}: "
                "install a later release of modeling_peer, or load with its own code (`trust_remote_code=True`)."
            )

    def validate_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "num_retrieval_heads",
            "num_experts_per_head",
            "query_size",
            "moe_num_experts",
            "moe_num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`, got {self.num_attention_heads} "
                f"and {self.num_key_value_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, two halves that rotate together, got {self.head_dim}.")
        # Transformers warns of token ids outside the vocabulary. This one also names a row of the embeddings that gets
        # no gradient, the last one if it is -1.
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be `None` or within the vocabulary, from 0 to {self.vocab_size - 1}, got "
                f"{self.pad_token_id}."
            )

    def validate_numbers(self):
        for name in ("initializer_range", "expert_initializer_range", "rms_norm_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        for name in ("attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a probability between 0 and 1, got {value}.")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"`router_aux_loss_coef` must be at least 0 and finite, got {self.router_aux_loss_coef}.")
        self._check_rope()

    def _check_rope(self):
        parameters = self.rope_parameters or {}
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"`rope_type` of `rope_parameters` must be 'default' or one of {sorted(ROPE_INIT_FUNCTIONS)}, got "
                f"{rope_type!r}."
            )
        theta = parameters.get("rope_theta", 1.0)
        is_number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
        if not is_number or not 0 < theta < math.inf:
            raise ValueError(f"`rope_theta` of `rope_parameters` must be positive and finite, got {theta!r}.")

    def validate_feed_forward_types(self):
        if len(self.feed_forward_types) != self.num_hidden_layers:
            raise ValueError(
                f"`feed_forward_types` must name one variant for each of `num_hidden_layers` = "
                f"{self.num_hidden_layers} layers, got {len(self.feed_forward_types)}: {self.feed_forward_types}."
            )

    def validate_retrieval(self):
        size = grid_size(self.num_experts)
        if self.num_experts_per_head > size:
            raise ValueError(
                f"`num_experts_per_head` must be at most √num_experts = {size}, the number of sub-keys of a half, "
                f"got {self.num_experts_per_head}."
            )
        if self.query_size % 2:
            raise ValueError(f"`query_size` must be even, two halves of one size, got {self.query_size}.")

    def validate_expert_additions(self):
        check_additions(
            self.expert_additions, self.feed_forward_types, self.num_experts, self.share_experts_across_layers
        )

    def validate_activations(self):
        for name in ("hidden_act", "expert_act"):
            value = getattr(self, name)
            if value is not None and value not in ACT2FN:
                raise ValueError(
                    f"`{name}` is {value!r}, not one of the activations of Transformers: {sorted(ACT2FN)}."
                )
            if value is not None and any(True for _ in ACT2FN[value].parameters()):
                raise ValueError(f"`{name}` is {value!r}, an activation with parameters: choose one without.")

    def validate_moe(self):
        if self.moe_num_experts_per_tok > self.moe_num_experts:
            raise ValueError(
                f"`moe_num_experts_per_tok` must be at most `moe_num_experts` = {self.moe_num_experts}, got "
                f"{self.moe_num_experts_per_tok}."
            )


__all__ = ["PeerConfig"]
