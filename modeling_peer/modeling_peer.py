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
"""PEER models in PyTorch: a Llama-style decoder whose layers take their feed-forward from the registry of variants."""

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import AutoModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import GeneralInterface
from transformers.utils.output_capturing import OutputRecorder

from .configuration_peer import PeerConfig, generations_of
from .experts import ExpertPool
from .feed_forward import ALL_FEED_FORWARDS, MoeRouter
from .router import ForwardPass, ProductKeyRouter


class CheckpointInterface(GeneralInterface):
    """
    Mapping from names of methods to functions `extend(method, model, *args, **kwargs)` that wrap them. With these, an
    installed package extends how models are loaded, split, trained and saved. `method` is the bound method of
    Transformers; `model` is the model, or its class for a class method.
    """

    _global_mapping: dict[str, Any] = {}


ALL_CHECKPOINT_FUNCTIONS = CheckpointInterface()


def _extensible(name):
    @wraps(getattr(PreTrainedModel, name))
    def method(self, *args, **kwargs):
        method_of_transformers = getattr(super(ExtensibleCheckpoints, self), name)
        extend = ALL_CHECKPOINT_FUNCTIONS.get(name)
        if extend is None:
            return method_of_transformers(*args, **kwargs)
        return extend(method_of_transformers, self, *args, **kwargs)

    return method


class ExtensibleCheckpoints:
    """The methods of [`PreTrainedModel`] that functions of [`CheckpointInterface`] may extend."""

    from_pretrained = classmethod(_extensible("from_pretrained"))
    save_pretrained = _extensible("save_pretrained")
    train = _extensible("train")
    load_state_dict = _extensible("load_state_dict")
    gather_sharded_state_dict_for_save = _extensible("gather_sharded_state_dict_for_save")
    init_parallel_plans = _extensible("init_parallel_plans")
    prepare_distribute_model = classmethod(_extensible("prepare_distribute_model"))
    maybe_distribute_model = classmethod(_extensible("maybe_distribute_model"))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this from the model that it wraps.
        return ALL_CHECKPOINT_FUNCTIONS.get("_ddp_params_and_buffers_to_ignore", lambda model: [])(self)


def check_package(config: Any) -> None:
    """Raise `ImportError` if a checkpoint is quantized by `modeling_peer` and that package is not imported."""
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "peer" and method not in AUTO_QUANTIZER_MAPPING:
        raise ImportError("The expert tables are quantized: install and import `modeling_peer` before loading them.")


@auto_docstring(custom_intro="Output of the base model.")
@dataclass
class PeerModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    router_indices (`tuple(torch.Tensor)`, *optional*, returned when `output_router_indices=True`):
        Indices of the experts that every token retrieved, best first: one tensor per router, the first router of a
        layer before those of its added experts. PEER and PKM layers give the shape
        `(batch_size, sequence_length, num_retrieval_heads, num_experts_per_head)`. MoE layers give the choices of
        tokens, of shape `(batch_size * sequence_length, moe_num_experts_per_tok)`.
    router_weights (`tuple(torch.Tensor)`, *optional*, returned when `output_router_weights=True`):
        Router weights of these experts, of the same shapes.
    router_logits (`tuple(torch.Tensor)`, *optional*, returned when `output_router_logits=True`):
        Router logits, one tensor of shape `(batch_size * sequence_length, moe_num_experts)` per MoE layer.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_weights: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Output of the language model.")
@dataclass
class PeerCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    router_indices (`tuple(torch.Tensor)`, *optional*, returned when `output_router_indices=True`):
        See [`PeerModelOutputWithPast`].
    router_weights (`tuple(torch.Tensor)`, *optional*, returned when `output_router_weights=True`):
        Router weights of these experts, of the same shapes.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_weights: tuple[torch.Tensor, ...] | None = None


class PeerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        if (name := config.feed_forward_types[layer_idx]) not in ALL_FEED_FORWARDS:
            raise ValueError(f"`feed_forward_types` names {name!r}, which is not registered: {[*ALL_FEED_FORWARDS]}.")
        self.mlp = ALL_FEED_FORWARDS[name](config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        expert_pool: ExpertPool | None = None,
        forward_pass: ForwardPass | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        # The cache is among `kwargs`, as its name depends on the release of Transformers.
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(
            hidden_states, padding_mask=padding_mask, expert_pool=expert_pool, forward_pass=forward_pass
        )
        return residual + hidden_states


@auto_docstring(custom_intro="Base class of all PEER models.")
class PeerPreTrainedModel(ExtensibleCheckpoints, PreTrainedModel):
    config: PeerConfig
    base_model_prefix = "model"
    was_loaded = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeerDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values", "expert_pool"]  # the cache by all its names
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PeerDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(MoeRouter, index=2),
        "router_indices": [OutputRecorder(ProductKeyRouter, index=0), OutputRecorder(MoeRouter, index=0)],
        "router_weights": [OutputRecorder(ProductKeyRouter, index=1), OutputRecorder(MoeRouter, index=1)],
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for its decorator of experts in this file. MoE layers have it in `feed_forward.py`.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        if hasattr(module, "init_own_weights"):
            module.init_own_weights()
        elif hasattr(module, "init_std"):  # a table of `make_table`, a router of MoE
            init.normal_(module.weight, std=module.init_std)
        else:
            super()._init_weights(module)


@auto_docstring(custom_intro="The bare PEER model, which returns hidden states without any specific head on top.")
class PeerModel(PeerPreTrainedModel, LlamaModel):
    def __init__(self, config: PeerConfig):
        config.validate()  # once more: fields may have been set since
        check_package(config)
        PreTrainedModel.__init__(self, config)  # not that of LlamaModel, which makes Llama layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([PeerDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        # One module for all PEER layers: Transformers ties parameters only if embeddings are tied.
        shares_pool = config.share_experts_across_layers and "peer" in config.feed_forward_types
        self.expert_pool = ExpertPool(config, generations_of(config)) if shares_pool else None
        self.gradient_checkpointing = False

        self.post_init()

    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeerModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*): The KV cache, `past_key_values` before Transformers 5.24.
        padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            True (or 1) for tokens, False (or 0) for padding, which feed-forwards do not learn from. Taken from a
            two-dimensional `attention_mask` if not given. Attention does not read it.

        Returns:
            [`PeerModelOutputWithPast`], or a tuple of its elements if `return_dict=False`.
        """
        if cache is not None:
            kwargs["cache"] = cache
        if padding_mask is None:
            padding_mask = _padding_mask(attention_mask, input_ids, inputs_embeds)
        forward_pass = ForwardPass(learns=self.training and torch.is_grad_enabled())
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            padding_mask=padding_mask,
            expert_pool=self.expert_pool,
            forward_pass=forward_pass,
            **kwargs,
        )
        forward_pass.has_ended = True
        return outputs if isinstance(outputs, tuple) else PeerModelOutputWithPast(**outputs)


def _padding_mask(attention_mask, input_ids, inputs_embeds):
    """The columns of present tokens in a two-dimensional mask of past and present ones. `None` for other masks."""
    inputs = inputs_embeds if input_ids is None else input_ids
    if inputs is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    mask, shape = attention_mask[:, -inputs.shape[1] :], tuple(inputs.shape[:2])
    if mask.shape != shape:
        raise ValueError(f"`attention_mask` must have shape {shape}, or longer, got {tuple(attention_mask.shape)}.")
    return mask


@auto_docstring(
    custom_intro="The PEER model for causal language modeling: a linear layer on top predicts the next token."
)
class PeerForCausalLM(PeerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PeerConfig):
        super().__init__(config)
        self.model = PeerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        padding_mask: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeerCausalLMOutputWithPast:
        r"""
        cache (`Cache`, *optional*): The KV cache, `past_key_values` before Transformers 5.24.
        padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            True (or 1) for tokens, as in [`PeerModel`]. The load-balancing loss leaves padding out.

        Returns:
            [`PeerCausalLMOutputWithPast`], or a tuple of its elements if `return_dict=False`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if padding_mask is None:
            padding_mask = _padding_mask(attention_mask, input_ids, inputs_embeds)

        outputs: PeerModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            padding_mask=padding_mask,
            output_router_logits=output_router_logits,
            **kwargs,
        )

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if outputs.router_logits:
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, self.config.moe_num_experts, self.config.moe_num_experts_per_tok, padding_mask
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return PeerCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **others)


class PeerHead:
    """Registers [`PeerModel`] with `AutoModel` for the generic heads, as code from a checkpoint is not registered."""

    def __init__(self, config: PeerConfig):
        AutoModel.register(type(config), PeerModel, exist_ok=True)
        super().__init__(config)


@auto_docstring(custom_intro="The PEER model with a linear layer on top that classifies the last token.")
class PeerForSequenceClassification(PeerHead, GenericForSequenceClassification, PeerPreTrainedModel):
    pass


@auto_docstring(custom_intro="The PEER model with dropout and a linear layer on top that classify every token.")
class PeerForTokenClassification(PeerHead, GenericForTokenClassification, PeerPreTrainedModel):
    pass


@auto_docstring(custom_intro="The PEER model with a linear layer that scores tokens as start and end of an answer.")
class PeerForQuestionAnswering(PeerHead, GenericForQuestionAnswering, PeerPreTrainedModel):
    pass


__all__ = [
    "PeerForCausalLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerModel",
    "PeerPreTrainedModel",
]
