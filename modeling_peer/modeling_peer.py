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
"""PyTorch PEER model: a Llama-style decoder whose layers take their feed-forward from the registry of variants."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checkpoint_conversion import register_head_selection
from .configuration_peer import PeerConfig
from .expert_generations import shared_generations
from .expert_table import ExpertTable
from .feed_forward import ALL_FEED_FORWARDS
from .feed_forward_moe import MoeFeedForward, MoeRouter
from .feed_forward_peer import ExpertPool
from .memory_advice import advise_random_access, advise_whole_access
from .product_key_router import ProductKeyRouter
from .query_norm import QueryBatchNorm
from .sparse_gradients import check_sparse_gradients
from .tensor_parallel import register_parallel_styles
from .training_advice import advise_on_added_experts


@auto_docstring(
    custom_intro="""
    Outputs of the base model.
    """
)
@dataclass
class PeerModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    router_indices (`tuple(torch.Tensor)`, *optional*, returned when `output_router_indices=True`):
        For each router that ran, a layer's own before those of its added experts, the experts that every token
        retrieved, best first: of shape
        `(batch_size, sequence_length, num_retrieval_heads, num_experts_per_head)` for PEER and PKM layers,
        `(batch_size * sequence_length, moe_num_experts_per_tok)` for MoE layers.
    router_weights (`tuple(torch.Tensor)`, *optional*, returned when `output_router_weights=True`):
        Their router weights, of the same shapes.
    router_logits (`tuple(torch.Tensor)`, *optional*, returned when `output_router_logits=True`):
        For each MoE layer, logits of shape `(batch_size * sequence_length, moe_num_experts)`.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_weights: tuple[torch.Tensor, ...] | None = None


@auto_docstring(
    custom_intro="""
    Outputs of the language model.
    """
)
@dataclass
class PeerCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    router_indices (`tuple(torch.Tensor)`, *optional*, returned when `output_router_indices=True`):
        For each layer with a router, the experts that every token retrieved, see [`PeerModelOutputWithPast`].
    router_weights (`tuple(torch.Tensor)`, *optional*, returned when `output_router_weights=True`):
        Their router weights, of the same shapes.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_weights: tuple[torch.Tensor, ...] | None = None


def padding_mask_of(attention_mask: torch.Tensor | dict | None, sequence_length: int) -> torch.Tensor | None:
    """
    Where the last `sequence_length` positions hold tokens, `(batch_size, sequence_length)`. `None` if a mask of another
    form than `(batch_size, past and present length)` does not say.

    Raises:
        `ValueError`: if the mask is shorter than the inputs.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    if attention_mask.shape[1] < sequence_length:
        raise ValueError(
            f"`attention_mask` must cover past and present tokens, at least {sequence_length} of them, got one of shape "
            f"{tuple(attention_mask.shape)}."
        )
    return attention_mask[:, -sequence_length:]


def _advise_tables(model, advise):
    for module in model.modules():
        if isinstance(module, ExpertTable):
            advise(module.weight)


class PeerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = ALL_FEED_FORWARDS[config.feed_forward_types[layer_idx]](config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        padding_mask: torch.Tensor | None = None,
        expert_pool: ExpertPool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states, padding_mask=padding_mask, expert_pool=expert_pool)
        return residual + hidden_states


@auto_docstring
class PeerPreTrainedModel(PreTrainedModel):
    config: PeerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeerDecoderLayer"]
    _skip_keys_device_placement = ["cache", "expert_pool"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PeerDecoderLayer,
        "attentions": LlamaAttention,
        "router_indices": [OutputRecorder(ProductKeyRouter, index=0), OutputRecorder(MoeRouter, index=0)],
        "router_weights": [OutputRecorder(ProductKeyRouter, index=1), OutputRecorder(MoeRouter, index=1)],
        "router_logits": OutputRecorder(MoeRouter, index=2),
    }

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in the library. A file of weights stays where it is and is mapped; of the expert tables, whose rows are read
        at random, the operating system is told to read no more than asked for."""
        loaded = super().from_pretrained(*args, **kwargs)
        _advise_tables(loaded[0] if isinstance(loaded, tuple) else loaded, advise_random_access)
        return loaded

    def save_pretrained(self, *args, **kwargs):
        """As in the library, with the configuration refused before a file is written, and the model's own code saved
        where FSDP2 has put a class of its own in front of the model's."""
        self.config.validate()
        actual_class = type(self)
        if actual_class.__name__.startswith("FSDP"):
            self.__class__ = actual_class.__bases__[1]
        _advise_tables(self, advise_whole_access)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = actual_class
            _advise_tables(self, advise_random_access)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library looks for its decorator in this file; the MoE variant carries it in its own.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        # Every module of a feed-forward variant knows how its own parameters start.
        if hasattr(module, "init_own_weights"):
            module.init_own_weights()
        else:
            super()._init_weights(module)


@auto_docstring
class PeerModel(PeerPreTrainedModel):
    def __init__(self, config: PeerConfig):
        config.validate()  # its fields may have been set since it was made
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [PeerDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        # One pool for all PEER layers is one module of the base model: a tied key would count only with tied embeddings.
        shares_pool = config.share_experts_across_layers and "peer" in config.feed_forward_types
        self.expert_pool = ExpertPool(config, shared_generations(config)) if shares_pool else None
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeerModelOutputWithPast:
        r"""
        padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            True where there is a token. Taken from a two-dimensional `attention_mask` if not given; it tells the
            feed-forward which positions count while training, whatever the attention makes of its own mask.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        if padding_mask is None:
            padding_mask = padding_mask_of(attention_mask, inputs_embeds.shape[1])
        self._tell_whether_it_learns()

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                padding_mask=padding_mask,
                expert_pool=self.expert_pool,
                **kwargs,
            )

        self._fold_query_moments()

        hidden_states = self.norm(hidden_states)

        return PeerModelOutputWithPast(
            last_hidden_state=hidden_states,
            cache=cache,
        )

    def _tell_whether_it_learns(self):
        """Decided here once: a layer may run without gradients and yet be trained, under reentrant checkpointing."""
        learns = self.training and torch.is_grad_enabled()
        if learns:
            check_sparse_gradients(self)
            advise_on_added_experts(self)
        for module in self.layers.modules():
            if isinstance(module, (QueryBatchNorm, MoeFeedForward)):
                module.learns = learns
            if isinstance(module, QueryBatchNorm):
                module.pending_moments = None  # what a recomputation left behind

    def _fold_query_moments(self):
        """Here rather than in the layers, whose forward runs a second time under activation checkpointing."""
        for module in self.layers.modules():
            if isinstance(module, QueryBatchNorm):
                module.fold_moments()


@auto_docstring
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

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeerCausalLMOutputWithPast:
        r"""
        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_peer import PeerForCausalLM

        >>> model = PeerForCausalLM.from_pretrained("path/to/a/peer/checkpoint")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/a/peer/checkpoint")

        >>> inputs = tokenizer("def main():", return_tensors="pt")
        >>> generate_ids = model.generate(**inputs, max_new_tokens=30)
        >>> tokenizer.batch_decode(generate_ids, skip_special_tokens=True)[0]
        ```
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        outputs: PeerModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )

        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)

        aux_loss = None
        if outputs.router_logits:
            aux_loss = load_balancing_loss_func(
                outputs.router_logits,
                self.config.moe_num_experts,
                self.config.moe_num_experts_per_tok,
                padding_mask_of(attention_mask, outputs.last_hidden_state.shape[1]),
            )
            if labels is not None:
                loss += self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return PeerCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            router_weights=outputs.router_weights,
        )


class PeerForSequenceClassification(GenericForSequenceClassification, PeerPreTrainedModel):
    # As the generic heads build their base model through `AutoModel`, a checkpoint's own code could not load them.
    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        # Initialize weights and apply final processing
        self.post_init()


class PeerForTokenClassification(GenericForTokenClassification, PeerPreTrainedModel):
    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeerModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()


class PeerForQuestionAnswering(GenericForQuestionAnswering, PeerPreTrainedModel):
    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.model = PeerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        # Initialize weights and apply final processing
        self.post_init()


register_parallel_styles()
register_head_selection()


__all__ = [
    "PeerForCausalLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerModel",
    "PeerPreTrainedModel",
]
