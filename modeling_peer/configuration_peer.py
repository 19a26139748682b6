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

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import auto_docstring


FORMAT_VERSION = 1

POSITIVE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "num_retrieval_heads", "num_experts_per_head", "query_size"),
    *("moe_num_experts", "moe_num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("head_dim", "initializer_range", "expert_initializer_range", "rms_norm_eps"),
)

# pip never sees which releases the code in a checkpoint needs, so the code itself refuses those that it does not know.
for _library, _found, _first, _last in (
    ("Transformers", transformers.__version__, "5.19", 5),
    ("torch", torch.__version__, "2.9", 2),
):
    if Version(_found).release < Version(_first).release or Version(_found).major > _last:
        raise ImportError(f"PEER models run on {_library} {_first} to {_last}.x, found {_found}.")


@auto_docstring(
    custom_intro=r"""
    Configuration of a PEER model: a Llama-style decoder whose layers take their feed-forward from a registry of
    variants. The defaults are those of the paper, Xu Owen He, "Mixture of A Million Experts" ([arXiv
    2407.04153](https://arxiv.org/abs/2407.04153)): one layer of 1024² = 1,048,576 experts in the middle of 12. Small
    models learn better with experts in every layer, as in the example below.

    Configuration objects inherit from [`PreTrainedConfig`], see there for fields and methods that all models have.
    """
)
@strict
class PeerConfig(PreTrainedConfig):
    r"""
    feed_forward_types (`list[str]`, *optional*):
        The feed-forward variant of each layer: `"dense"`, `"moe"`, `"pkm"`, `"peer"`, or a name registered with
        [`FeedForwardInterface`]. Defaults to `"peer"` in the middle layer and `"dense"` in the others, as in the
        paper.
    num_experts (`int`, *optional*, defaults to 1048576):
        Number N of experts of a PEER layer, or of values of a PKM layer. It must be a perfect square.
    num_retrieval_heads (`int`, *optional*, defaults to 8):
        Number h of query networks of a layer.
    num_experts_per_head (`int`, *optional*, defaults to 16):
        Number k of experts that each head retrieves, at most √N. With k = 1, a softmax router does not learn. The
        value may be changed on a trained model.
    query_size (`int`, *optional*, defaults to 256):
        Size d_k of a query, an even number: each half is compared with one of the two sets of sub-keys.
    query_norm (`str`, *optional*, defaults to `"batch"`):
        Normalization of queries: `"batch"` over tokens, as in the paper (for causality in training see
        [`QueryBatchNorm`]), `"rms"` of each half of queries and keys, or `None`.
    scoring_func (`str`, *optional*, defaults to `"softmax"`):
        Function that turns a head's retrieved scores into router weights: `"softmax"`, `"sigmoid"` or `"relu"`.
    sub_keys_per_head (`bool`, *optional*, defaults to `False`):
        Whether each head has its own sub-keys. In the paper all heads share them.
    expert_act (`str`, *optional*, defaults to `"gelu"`):
        Activation σ of the experts, or `None` for no activation.
    expert_initializer_range (`float`, *optional*):
        Standard deviation of the initial down-projection vectors v_i of PEER experts, and of the values of PKM. If
        `None`, the initial output of the layer has the variance of a dense feed-forward's output.
    gated_experts (`bool`, *optional*, defaults to `False`):
        Whether experts are gated: σ(w_i · x) (u_i · x) v_i.
    share_experts_across_layers (`bool`, *optional*, defaults to `False`):
        Whether all PEER layers retrieve from one pool of experts, held by the base model, each with its own router.
    shared_expert_intermediate_size (`int`, *optional*):
        Width of a dense branch beside the experts of a PEER layer. No branch if `None`.
    expert_kernels (`str`, *optional*, defaults to `"auto"`):
        Implementation of retrieval and experts: `"eager"` (Algorithm 1 as printed), `"torch"`, or a name registered
        with [`ExpertsInterface`] or [`RetrievalInterface`]. The package registers `"cpu"` (C) and `"triton"` (GPU).
        `"auto"`, or an unknown name, selects the fastest for the device. Results differ by rounding only.
    expert_additions (`list[dict]`, *optional*):
        Additions of experts to PEER layers, in their order. Each has `layers`, `mode` and `num_experts`. A protected
        one also has `num_retrieval_heads` and `num_experts_per_head`. See [`Generation`].
    moe_num_experts (`int`, *optional*, defaults to 128):
        Number of experts of a MoE layer.
    moe_num_experts_per_tok (`int`, *optional*, defaults to 2):
        Number of experts of a MoE layer that a token uses.
    moe_intermediate_size (`int`, *optional*):
        Width of an expert of a MoE layer. Defaults to `intermediate_size // moe_num_experts_per_tok`, which gives the
        FLOPs of a dense layer.
    moe_routing (`str`, *optional*, defaults to `"token_choice"`):
        Routing of MoE layers in training: `"token_choice"` or `"expert_choice"`, see [`MoeFeedForward`].
    router_aux_loss_coef (`float`, *optional*):
        Weight of the load-balancing loss of MoE layers, computed if `output_router_logits` is true. Defaults to 0.001
        with MoE layers and to zero without.
    output_router_indices (`bool`, *optional*, defaults to `False`):
        Whether to return the indices of the experts that PEER, PKM and MoE layers retrieved.
    output_router_weights (`bool`, *optional*, defaults to `False`):
        Whether to return the router weights of these experts.
    format_version (`int`, *optional*, defaults to 1):
        Version of the checkpoint format. The code refuses versions later than it knows.

    ```python
    >>> from modeling_peer import PeerConfig, PeerModel

    >>> # A small model with 4096 experts in each of 4 layers
    >>> configuration = PeerConfig(
    ...     hidden_size=128,
    ...     num_attention_heads=4,
    ...     num_hidden_layers=4,
    ...     feed_forward_types=["peer"] * 4,
    ...     num_experts=64**2,
    ... )

    >>> # Initializing a model (with random weights) from the configuration
    >>> model = PeerModel(configuration)
    ```"""

    model_type = "peer"
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
        # Name no repository, even if the code was loaded from one: every checkpoint carries the code itself.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_peer.PeerConfig",
            "AutoModel": "modeling_peer.PeerModel",
            "AutoModelForCausalLM": "modeling_peer.PeerForCausalLM",
            "AutoModelForSequenceClassification": "modeling_peer.PeerForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_peer.PeerForTokenClassification",
            "AutoModelForQuestionAnswering": "modeling_peer.PeerForQuestionAnswering",
        }
        super().__post_init__(**kwargs)
        if self.output_attentions and self._attn_implementation is None:
            self._attn_implementation = "eager"  # as the property's setter does: the model validates again

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
        for name in POSITIVE_FIELDS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        for name, value in (("head_dim", self.head_dim), ("query_size", self.query_size)):
            if value % 2:
                raise ValueError(f"`{name}` must be even, two halves of one size, got {value}.")
        limits = {"num_experts_per_head": grid_size(self.num_experts), "moe_num_experts_per_tok": self.moe_num_experts}
        for name, most in {**limits, "attention_dropout": 1, "classifier_dropout": 1}.items():
            if getattr(self, name) > most:
                raise ValueError(f"`{name}` must be at most {most}, got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`, got {self.num_attention_heads} "
                f"and {self.num_key_value_heads}."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"`pad_token_id` must be `None` or below {self.vocab_size}, got {self.pad_token_id}.")

    def validate_feed_forward_types(self):
        if len(self.feed_forward_types) != self.num_hidden_layers:
            raise ValueError(
                f"`feed_forward_types` must name one variant for each of `num_hidden_layers` = "
                f"{self.num_hidden_layers} layers, got {len(self.feed_forward_types)}: {self.feed_forward_types}."
            )

    def validate_activations(self):
        for name in ("hidden_act", "expert_act"):
            value = getattr(self, name)
            if value is not None and (value not in ACT2FN or any(True for _ in ACT2FN[value].parameters())):
                raise ValueError(f"`{name}` must be an activation of Transformers without parameters, got {value!r}.")

    def validate_expert_additions(self):
        peer_layers = {i for i, name in enumerate(self.feed_forward_types) if name == "peer"}
        for addition in self.expert_additions or ():
            layers, mode = addition.get("layers"), addition.get("mode")
            if mode not in ("open", "protected"):
                raise ValueError(f"The `mode` of an addition of experts must be 'open' or 'protected', got {mode!r}.")
            if not layers or not peer_layers.issuperset(layers):
                raise ValueError(
                    f"`layers` of an addition of experts must be some of the PEER layers {sorted(peer_layers)}, got "
                    f"{layers!r}."
                )
            if self.share_experts_across_layers and peer_layers != set(layers):
                raise ValueError(f"`layers` must be all PEER layers, as they share one pool of experts, got {layers}.")
        for layer_idx in peer_layers if self.expert_additions else ():
            for generation in generations_of(self, layer_idx):
                if generation.num_experts_per_head > grid_size(generation.num_experts):
                    raise ValueError(f"`num_experts_per_head` must be at most √num_experts, got {generation}.")


def grid_size(num_experts: int) -> int:
    """The side √N of the key grid of N = `num_experts` experts. Raises `ValueError` if N is not a perfect square."""
    size = math.isqrt(max(num_experts, 0))
    if size < 1 or size * size != num_experts:
        raise ValueError(
            f"`num_experts` must be a perfect square, one expert for each pair of two sets of sub-keys, "
            f"got {num_experts}; the nearest are {max(size, 1) ** 2} and {(max(size, 1) + 1) ** 2}."
        )
    return size


@dataclass(frozen=True)
class Generation:
    """
    Experts of a layer that are retrieved together, by their own heads: the initial experts of a PEER layer, or those
    of a protected addition. An addition in `"open"` mode enlarges the key grid of the first generation, in which old
    and new experts compete. One in `"protected"` mode is a generation with its own router, softmax and gate. Expert
    indices are consecutive over the generations of a layer, each from its `first_expert`: growth changes no index.
    """

    num_experts: int
    num_heads: int
    num_experts_per_head: int
    first_expert: int = 0


def generations_of(config: PeerConfig, layer_idx: int | None = None) -> list[Generation]:
    """The generations of a PEER layer, or of the shared pool if `layer_idx` is `None`, ordered by expert index."""
    heads, per_head = config.num_retrieval_heads, config.num_experts_per_head
    generations = [Generation(config.num_experts, heads, per_head)]
    for addition in config.expert_additions or ():
        if layer_idx is not None and layer_idx not in addition["layers"]:
            continue
        last, added = generations[-1], addition["num_experts"]
        if addition["mode"] == "protected":
            heads, per_head = addition["num_retrieval_heads"], addition["num_experts_per_head"]
            generations.append(Generation(added, heads, per_head, last.first_expert + last.num_experts))
        elif len(generations) == 1:
            generations = [Generation(last.num_experts + added, heads, per_head)]
        else:
            raise ValueError("`expert_additions` has an open addition after a protected one, which it would displace.")
    return generations


__all__ = ["PeerConfig"]
