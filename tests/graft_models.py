# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Small random base models of six families, and grafts on them."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny_models import VOCAB_SIZE, random_tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from modeling_peer.graft.model import PeerGraftConfig
from modeling_peer.graft_layer import PeerGraft


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SPECIAL = {
    name: SIZES[name] for name in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
}

BASE_MODELS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "gemma2": Gemma2Config(**SIZES, sliding_window=4),
    "gpt2": GPT2Config(**SPECIAL, n_embd=24, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "olmo2": Olmo2Config(**{name: size for name, size in SIZES.items() if name != "head_dim"}),
}

PLACEMENTS = {
    "beside": {},
    "beside_batch": {"query_norm": "batch", "gated_experts": True},
    "in_place": {"placement": "in_place", "init_from_ffn": False, "query_norm": None, "scoring_func": "sigmoid"},
    "neurons": {"placement": "in_place", "num_experts": 10**2},
}

# Every family and every placement; not every pair of them, as the code does not know one from the other. GPT-2 has
# biases.
FAMILIES_AND_PLACEMENTS = [(family, "beside_batch") for family in BASE_MODELS] + [
    ("gpt2", "beside"),
    ("gpt2", "in_place"),
    ("gpt2", "neurons"),
    ("llama", "neurons"),
]

TASKS = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
HEADS = {"SEQ_CLS": {"score"}, "TOKEN_CLS": {"score"}, "QUESTION_ANS": {"qa_outputs"}}


def base_model_of(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **fields
) -> PreTrainedModel:
    """A random base model in evaluation; its biases and norms are not their first ones."""
    config = copy.deepcopy(BASE_MODELS[family])
    if fields:
        config = type(config)(**{**config.to_dict(), **fields})
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    model.config.dtype = dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)  # buffers of rotary embeddings stay in float32, as in a loaded one
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.1)
    return model


def graft_config(**fields) -> PeerGraftConfig:
    """A small graft on the middle layer; `fields` override."""
    sizes = {"num_experts": 8**2, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_size": 8}
    return PeerGraftConfig(**{"task_type": "CAUSAL_LM", **sizes, **fields})


def grafted(base_model: PreTrainedModel | str = "llama", adapter_name: str = "default", seed: int = 0, **fields):
    """A base model with a new graft, in evaluation."""
    base_model = base_model_of(base_model) if isinstance(base_model, str) else base_model
    torch.manual_seed(seed)
    return get_peft_model(base_model, graft_config(**fields), adapter_name=adapter_name).eval()


def merged_in_turn(*numbers_of_experts: int) -> PreTrainedModel:
    """A base model into which a trained graft after the other was merged, with so many experts each."""
    model = base_model_of()
    for number in numbers_of_experts:
        model = trained(grafted(model, num_experts=number)).merge_and_unload()
    return model


def trained(model, steps: int = 3, seed: int = 5):
    """The model after a few steps, in evaluation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    model.train()
    for step in range(steps):
        tokens = random_tokens(2, 12, seed=seed + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def grafts_of(model) -> list[PeerGraft]:
    return [module for module in model.modules() if isinstance(module, PeerGraft)]


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor | None = None, **inputs) -> torch.Tensor:
    return model(input_ids=random_tokens(2, 9) if tokens is None else tokens, **inputs).logits


def middle_feed_forward(family):
    return "h.1.mlp" if family == "gpt2" else "layers.1.mlp"


def state_of(base_model):
    """Everything that a refusal must leave alone."""
    tensors = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
    modules = [(name, type(module)) for name, module in base_model.named_modules()]
    trains = [parameter.requires_grad for parameter in base_model.parameters()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in base_model.modules()]
    return tensors, modules, trains, hooks, base_model.config.to_dict(), hasattr(base_model, "peft_config")


def assert_same_state(found, expected):
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name
    assert found[0].keys() == expected[0].keys()
    assert found[1:] == expected[1:]


def assert_refused(base_model, config, message):
    before = state_of(base_model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base_model, config)
    assert_same_state(state_of(base_model), before)
