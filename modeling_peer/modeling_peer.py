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
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .built_configuration import built_fields, check_built
from .checkpoint_card import replace_card_of_transformers, write_card
from .checkpoint_conversion import head_selection
from .configuration_peer import PeerConfig
from .expert_generations import shared_generations
from .expert_kernels import check_expert_kernels
from .expert_table import refuse_quantized
from .feed_forward import ALL_FEED_FORWARDS, check_feed_forward_types, custom_variants, feed_forward_plan
from .feed_forward_moe import MoeRouter
from .feed_forward_peer import ExpertPool
from .forward_pass import ForwardPass
from .gradient_exchange import names_of_tables, replicated_tables
from .growth_advice import advise_on_added_experts
from .library_releases import CACHE, rename_cache, slice_logits_to_keep
from .masks import check_masks, padding_mask_of
from .memory_advice import advise_random_access, advise_whole_access
from .memory_group import (
    MemoryGroup,
    check_processes,
    form_memory_group,
    is_split,
    refuse_other_seeds,
    register_memory_group_styles,
    tables_left_out,
)
from .product_key_router import ProductKeyRouter
from .quantization import register_quantization
from .split_checkpoints import gather_tables, in_its_own_class, load_parts, state_dict_to_save
from .split_initialization import initialized_whole, zero_padding
from .table_memory import advise_tables, keep_in_host_memory
from .tensor_parallel import register_parallel_styles


@auto_docstring(
    custom_intro="""
    Output of the base model.
    """
)
@dataclass
class PeerModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    router_indices (`tuple(torch.Tensor)`, *optional*, returned when `output_router_indices=True`):
        Indices of the experts that every token retrieved, best first: one tensor per router that ran, the first router
        of a layer before those of its added experts. Of shape
        `(batch_size, sequence_length, num_retrieval_heads, num_experts_per_head)` for PEER and PKM layers, and
        `(batch_size * sequence_length, moe_num_experts_per_tok)` for MoE layers: what tokens choose, although in
        training by expert choice it is not what runs.
    router_weights (`tuple(torch.Tensor)`, *optional*, returned when `output_router_weights=True`):
        Router weights of these experts, of the same shapes.
    router_logits (`tuple(torch.Tensor)`, *optional*, returned when `output_router_logits=True`):
        Router logits, one tensor of shape `(batch_size * sequence_length, moe_num_experts)` per MoE layer.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_weights: tuple[torch.Tensor, ...] | None = None


@auto_docstring(
    custom_intro="""
    Output of the language model.
    """
)
@dataclass
class PeerCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    router_indices (`tuple(torch.Tensor)`, *optional*, returned when `output_router_indices=True`):
        Indices of the experts that every token retrieved, see [`PeerModelOutputWithPast`].
    router_weights (`tuple(torch.Tensor)`, *optional*, returned when `output_router_weights=True`):
        Router weights of these experts, of the same shapes.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_weights: tuple[torch.Tensor, ...] | None = None


def check_configuration(config: PeerConfig) -> None:
    """
    Refuse a configuration that no model can be built of. Its fields may have changed since it was made, and it does
    not know the registries of feed-forward variants and of kernels.

    Raises:
        `StrictDataclassError`: if a field is wrong.
        `ValueError`: if it names a feed-forward variant or kernels that are not registered.
    """
    config.validate()
    check_feed_forward_types(config.feed_forward_types)
    check_expert_kernels(config.expert_kernels)


class PeerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.feed_forward_type = config.feed_forward_types[layer_idx]
        self.mlp = ALL_FEED_FORWARDS[self.feed_forward_type](config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @rename_cache
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
        forward_pass: ForwardPass | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **{CACHE: cache},
            **kwargs,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(
            hidden_states, padding_mask=padding_mask, expert_pool=expert_pool, forward_pass=forward_pass
        )
        return residual + hidden_states


@auto_docstring(
    custom_intro="""
    Base class of all PEER models: how they are initialized, saved and loaded.
    """
)
class PeerPreTrainedModel(PreTrainedModel):
    config: PeerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeerDecoderLayer"]
    _skip_keys_device_placement = [CACHE, "expert_pool"]
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
    saves_quantized_experts = True
    # Set while `Trainer` saves, in one process, what all of them have gathered.
    gathered_state_dict: dict[str, torch.Tensor] | None = None

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """
        As in Transformers. Expert tables stay in the mapped file, and the operating system is advised to read no more
        than the rows that are asked for. Those that `device_map` puts on `"cpu"` are never copied to a GPU: their
        experts run on the CPU.
        """
        register_quantization()
        path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with head_selection(cls.config_class, path, kwargs):
            loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        keep_in_host_memory(model)
        advise_tables(model, advise_random_access)
        return loaded

    @classmethod
    def from_config(cls, config: PeerConfig, **kwargs):
        """
        Make a model with new weights, in training mode, as its constructor does, but with the arguments of
        `from_pretrained`: with a `distributed_config` it is split before it has memory. No process allocates the whole
        of an expert table. All must have the same seed; on a CPU, the weights are then those that one process draws
        here without a `distributed_config`, and in any case they do not depend on the number of processes.

        Args:
            config (`PeerConfig`)
            kwargs: `distributed_config`, `dtype` and others of `from_pretrained`.

        ```python
        >>> torch.manual_seed(0)
        >>> model = PeerForCausalLM.from_config(config, distributed_config=DistributedConfig(fsdp_size=8, ep_size=8))
        ```
        """
        refuse_other_seeds(kwargs.get("distributed_config"))
        with initialized_whole():
            model = cls.from_pretrained(None, config=config, state_dict={}, **kwargs)
        model.name_or_path = model.config.name_or_path = ""  # not "None", which cards would name as its base model
        zero_padding(model)
        return model.train()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As in Transformers, and writes a short model card where there is no other. Works with FSDP2 too, and warns of
        feed-forward variants whose code the checkpoint does not carry.

        Raises:
            `StrictDataclassError` or `ValueError`: before a file is written, if the configuration is wrong, if a
                field of it that the model does not follow was changed after the model was built, or if
                [`shard_experts`] split the model and neither a `state_dict` is given nor has
                [`SplitCheckpointCallback`] gathered the tables.
        """
        check_configuration(self.config)
        check_built(self.base_model, self.config)
        state_dict = state_dict_to_save(self, kwargs.get("state_dict"))
        if state_dict is not None:
            kwargs["state_dict"] = state_dict
        self._save_directory = save_directory
        variants = custom_variants(self.config.feed_forward_types)
        advise_tables(self, advise_whole_access)
        try:
            super(PeerPreTrainedModel, in_its_own_class(self)).save_pretrained(save_directory, *args, **kwargs)
        finally:
            advise_tables(self, advise_random_access)
        write_card(save_directory, self, variants)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """As in Transformers, which calls it to push a model whose card it has written over."""
        replace_card_of_transformers(working_dir, self, custom_variants(self.config.feed_forward_types))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, *args, **kwargs):
        """As in Transformers, which calls it. Gathers the tables of a memory group in files, and not in memory."""
        tables = gather_tables(state_dict, self._save_directory)
        rest = {name: tensor for name, tensor in state_dict.items() if not is_split(tensor)}
        with tables_left_out(model_to_save):
            rest = super().gather_sharded_state_dict_for_save(model_to_save, rest, *args, **kwargs)
        return {**rest, **tables}

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As in torch, and a split model takes its parts of whole tensors, as `Trainer` loads them to resume."""
        return super().load_state_dict(load_parts(self, state_dict), *args, **kwargs)

    @classmethod
    def prepare_distribute_model(cls, distributed_config, *args, **kwargs):
        """As in Transformers, which calls it. Refuses what no memory group can be formed of."""
        return super().prepare_distribute_model(check_processes(distributed_config), *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As in Transformers, which calls it. With an `ep_size` the tables are split over a memory group first."""
        if distributed_config is not None:
            refuse_quantized(model, "A model with a `distributed_config`")
        if (getattr(distributed_config, "ep_size", None) or 1) > 1 and mesh_manager is not None:
            form_memory_group(model, distributed_config, mesh_manager)
        with tables_left_out(model):
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads it of the model that it wraps.
        return names_of_tables(self)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for its decorator of experts in this file. The file of the MoE variant has it.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        # Modules of feed-forward variants initialize their own parameters.
        if hasattr(module, "init_own_weights"):
            module.init_own_weights()
        else:
            super()._init_weights(module)


@auto_docstring(
    custom_intro="""
    The bare PEER model, which returns hidden states without any specific head on top.
    """
)
class PeerModel(PeerPreTrainedModel):
    def __init__(self, config: PeerConfig):
        check_configuration(config)
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [PeerDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        # The pool of all PEER layers is one module of the base model: a tied key would count only with tied
        # embeddings.
        shares_pool = config.share_experts_across_layers and "peer" in config.feed_forward_types
        self.expert_pool = ExpertPool(config, shared_generations(config)) if shares_pool else None
        self.gradient_checkpointing = False
        self.built_fields = built_fields(config)
        self.memory_group: MemoryGroup | None = None

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @rename_cache
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
            True (or 1) where there is a token, which feed-forwards learn from; taken from a two-dimensional
            `attention_mask` if not given. Attention does not read it.

        Returns:
            [`PeerModelOutputWithPast`], or a tuple of its elements if `return_dict=False`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")

        tables = replicated_tables(self)
        forward_pass = ForwardPass.of_model(self)
        if forward_pass.learns:
            advise_on_added_experts(self)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        check_masks(attention_mask, padding_mask, inputs_embeds, cache, forward_pass.learns)
        if padding_mask is None:
            padding_mask = padding_mask_of(attention_mask, inputs_embeds.shape[1])

        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                padding_mask=padding_mask,
                expert_pool=self.expert_pool,
                forward_pass=forward_pass,
                **{CACHE: cache},
                **kwargs,
            )

        forward_pass.end()

        hidden_states = self.norm(hidden_states)
        if tables is not None:
            tables.average_after_backward(hidden_states)

        return PeerModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})

    def init_parallel_plans(self) -> None:
        """Make the plans as Transformers does, and add those of the feed-forward variants."""
        super().init_parallel_plans()
        tp_plan, ep_plan = (feed_forward_plan(kind, self.config) for kind in ("tp_plan", "ep_plan"))
        if self.expert_pool is not None:
            tp_plan |= {f"expert_pool.{module}": style for module, style in ExpertPool.tp_plan(self.config).items()}
            ep_plan |= ExpertPool.ep_plan(self.config)
        # What was set on the configuration goes first.
        self._tp_plan = tp_plan | self._tp_plan
        self._ep_plan = ep_plan | self._ep_plan


@auto_docstring(
    custom_intro="""
    The PEER model for causal language modeling: a linear layer on top predicts the next token.
    """
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

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    @rename_cache
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
        padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            True (or 1) where there is a token, as in [`PeerModel`]. The load-balancing loss leaves padding out.

        Returns:
            [`PeerCausalLMOutputWithPast`], or a tuple of its elements if `return_dict=False`.

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
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            padding_mask=padding_mask,
            output_router_logits=output_router_logits,
            **{CACHE: cache},
            **kwargs,
        )

        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)

        aux_loss = None
        if outputs.router_logits:
            if padding_mask is None:
                padding_mask = padding_mask_of(attention_mask, outputs.last_hidden_state.shape[1])
            aux_loss = load_balancing_loss_func(
                outputs.router_logits,
                self.config.moe_num_experts,
                self.config.moe_num_experts_per_tok,
                padding_mask,
            )
            if labels is not None:
                loss += self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return PeerCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            router_weights=outputs.router_weights,
            **{CACHE: getattr(outputs, CACHE)},
        )


@auto_docstring(
    custom_intro="""
    The PEER model with a sequence classification head: a linear layer on top classifies the last token.
    """
)
class PeerForSequenceClassification(GenericForSequenceClassification, PeerPreTrainedModel):
    # The generic heads build their base model through `AutoModel`, which does not find the code of a checkpoint.
    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        # Initialize weights and apply final processing
        self.post_init()


@auto_docstring(
    custom_intro="""
    The PEER model with a token classification head: dropout and a linear layer on top classify every token.
    """
)
class PeerForTokenClassification(GenericForTokenClassification, PeerPreTrainedModel):
    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeerModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()


@auto_docstring(
    custom_intro="""
    The PEER model with a head for extractive question answering: a linear layer on top scores every token as the start
    and as the end of the answer.
    """
)
class PeerForQuestionAnswering(GenericForQuestionAnswering, PeerPreTrainedModel):
    def __init__(self, config: PeerConfig):
        PeerPreTrainedModel.__init__(self, config)
        self.model = PeerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        # Initialize weights and apply final processing
        self.post_init()


register_parallel_styles()
register_memory_group_styles()


__all__ = [
    "PeerForCausalLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerModel",
    "PeerPreTrainedModel",
]
