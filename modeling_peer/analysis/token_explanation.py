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
"""What the experts do in a text: which ones each token retrieves, how strongly they answer, and what they write."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..feed_forward_peer import ExpertPool
from ..feed_forward_pkm import PkmFeedForward
from ..product_key_router import ProductKeyRouter
from .arguments import check_integer, shown
from .evaluation import evaluation
from .expert_sets import ExpertSet, module_label, select_expert_sets


# What decoders of Transformers call it. Of a model that has none of these, vectors are read as they are.
LAST_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


@dataclass(frozen=True)
class ExpertUse:
    """
    An expert as one token uses it.

    Args:
        expert (`int`): Its index.
        weight (`float`): Its router weight, summed over the heads that retrieve it.
        coefficient (`float`):
            What its down-projection vector is multiplied by: the router weight times the activation. For PKM, whose
            values have no neuron, it is the weight.
        words (`tuple[str]`): The tokens whose logits this raises most, the first one most of all.
    """

    expert: int
    weight: float
    coefficient: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class TokenExplanation:
    """
    The experts of a token.

    Args:
        token (`str`): The token, as text.
        layers (`dict[str, list[ExpertUse]]`):
            For each layer with experts, `"layer_1"` and so on (`"layer_1_default"` for the graft of the adapter of
            this name), the experts of largest router weight, the largest first.
    """

    token: str
    layers: dict[str, list[ExpertUse]]


@dataclass(frozen=True, eq=False)
class RetrievedExperts:
    """
    The experts that a layer retrieves for the tokens of a sequence. Experts that several heads retrieve for a token
    are in it several times.

    Args:
        experts (`torch.Tensor` of shape `(num_tokens, num_active)`): Expert indices, int64.
        weights (`torch.Tensor` of the same shape): Their router weights, float32.
        coefficients (`torch.Tensor` of the same shape): See [`ExpertUse`], float32.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    coefficients: torch.Tensor

    def largest(self, token: int, number: int) -> list[tuple[int, float, float]]:
        """The experts of a token of largest weight, each once: index, weight and coefficient, the largest first."""
        experts, places = self.experts[token].unique(return_inverse=True)
        weights, coefficients = (
            torch.zeros(len(experts)).index_add_(0, places, each[token]) for each in (self.weights, self.coefficients)
        )
        order = weights.argsort(descending=True, stable=True)[:number]
        return [
            (int(experts[each]), weights[each].item(), coefficients[each].item()) for each in order if weights[each]
        ]


class ExpertReader:
    """
    Reads what the experts of a model do. A model with PEER or PKM layers, or with grafts, in one process.

    Args:
        model (`nn.Module`): A causal language model.
        layers (`int` or iterable of `int`, *optional*): Indices of the layers to read. All layers if `None`.

    Raises:
        `ValueError`: if the model has no experts, or none in one of the layers.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int] | int | None = None):
        self.model: Any = model
        modules = dict(model.named_modules())
        names = {module: name for name, module in modules.items()}
        self._label_of: dict[ProductKeyRouter, str] = {}
        self._pool_of: dict[ProductKeyRouter, ExpertPool | None] = {}
        self._tables_of: dict[str, dict[int, Any]] = {}
        self._set_of: dict[str, ExpertSet] = {}
        for name, experts in select_expert_sets(model, layers).items():
            holder: Any = model.get_submodule(name)
            pools = {each.first_expert: each for each in holder.modules() if isinstance(each, ExpertPool)}
            for router in experts.routers:
                label = module_label(modules, names[router])
                self._label_of[router] = label
                self._set_of[label] = experts
                is_pkm = isinstance(holder, PkmFeedForward)
                self._pool_of[router] = None if is_pkm else pools[router.generation.first_expert]
                self._tables_of[label] = (
                    {0: holder.values} if is_pkm else {first: each.down_proj for first, each in pools.items()}
                )

    @property
    def labels(self) -> list[str]:
        """The names of the layers, in their order."""
        return list(self._tables_of)

    def routers(self, label: str) -> list[ProductKeyRouter]:
        """The routers of a layer, one for each generation."""
        return [router for router, own in self._label_of.items() if own == label]

    def expert_set(self, label: str) -> ExpertSet:
        """The experts of a layer, which are those of all layers that share its pool."""
        return self._set_of[label]

    def read(self, **inputs: Any) -> tuple[dict[str, RetrievedExperts], torch.Tensor]:
        """
        Run the model on one sequence, in evaluation mode.

        Args:
            inputs: Arguments of the model: `input_ids` of shape `(1, num_tokens)`, or others.

        Returns:
            `tuple`: for each layer the [`RetrievedExperts`], on the CPU; and the logits, float32,
            `(num_tokens, vocab_size)`.
        """
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {label: [] for label in self.labels}

        def observe(router, args, output):
            found[self._label_of[router]].append(self._coefficients(router, args[0], *output))

        hooks = [router.register_forward_hook(observe) for router in self._label_of]
        try:
            with evaluation(self.model):
                logits = self.model(**inputs).logits[0].float()
        finally:
            for hook in hooks:
                hook.remove()
        read = {
            label: RetrievedExperts(*(torch.cat(parts, dim=1) for parts in zip(*several, strict=True)))
            for label, several in found.items()
            if several  # all of a layer's experts may be masked
        }
        return read, logits

    def _coefficients(self, router, hidden_states, indices, weights):
        tokens = hidden_states.flatten(0, -2)
        indices, weights = (each.flatten(-2).flatten(0, -2) for each in (indices, weights))
        pool, coefficients = self._pool_of[router], weights
        if pool is not None:
            rows = indices - pool.first_expert
            neurons = pool.up_proj(tokens, rows)
            gates = None if pool.gate_proj is None else pool.gate_proj(tokens, rows)
            coefficients = weights * (pool.act_fn(neurons) if gates is None else pool.act_fn(gates) * neurons)
        return indices.cpu(), weights.float().cpu(), coefficients.float().cpu()

    @torch.no_grad()
    def down_projections(self, label: str, experts: torch.Tensor) -> torch.Tensor:
        """
        Read the down-projection vectors of experts of a layer.

        Args:
            label (`str`): Name of the layer.
            experts (`torch.Tensor` of shape `(num_experts,)`): Expert indices, int64.

        Returns:
            `torch.Tensor` of shape `(num_experts, hidden_size)`, in the dtype of the table.
        """
        tables = self._tables_of[label]
        firsts = torch.tensor(sorted(tables))
        own = firsts[torch.searchsorted(firsts, experts, right=True) - 1]
        vectors = None
        for first, table in tables.items():
            (chosen,) = torch.nonzero(own == first, as_tuple=True)
            # By a call of the table, whatever an adapter, a quantizer or an offloader has put around it.
            one = torch.ones(len(chosen), 1, device=table.weight.device, dtype=self._dtype)
            rows = table(one, (experts[chosen] - first)[:, None].to(one.device)).to(self._device)
            rows = rows[:, : self.model.get_output_embeddings().weight.shape[1]]  # a graft's may have one for biases
            vectors = rows.new_empty(len(experts), rows.shape[1]) if vectors is None else vectors
            vectors[chosen] = rows
        return vectors

    @torch.no_grad()
    def writes(self, label: str, experts: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Find which tokens' logits the down-projection vectors of experts raise and lower most, if each were all that
        the last norm of the model sees ("logit lens").

        Args:
            label (`str`): Name of the layer.
            experts (`torch.Tensor` of shape `(num_experts,)`): Expert indices, int64.
            number (`int`): How many tokens to find.

        Returns:
            `tuple(torch.Tensor)` of shape `(num_experts, number)`: token ids that are raised, and those that are
            lowered, the most first.
        """
        vectors = self.down_projections(label, experts)
        decoder = self.model.get_decoder()
        norm = next((module for name in LAST_NORMS if (module := getattr(decoder, name, None)) is not None), None)
        logits = self.model.get_output_embeddings()(vectors if norm is None else norm(vectors)).float()
        number = min(number, logits.shape[1])
        return tuple(logits.topk(number, largest=largest).indices.cpu() for largest in (True, False))

    @property
    def _device(self):
        return self.model.get_output_embeddings().weight.device

    @property
    def _dtype(self):
        return self.model.get_input_embeddings().weight.dtype


def explain_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    num_experts: int = 5,
    num_words: int = 5,
    layers: Iterable[int] | int | None = None,
) -> list[TokenExplanation]:
    """
    Find which experts the tokens of a text use, and what these write.

    Args:
        model (`nn.Module`): A causal language model with PEER or PKM layers, or with grafts.
        tokenizer ([`PreTrainedTokenizerBase`])
        text (`str`)
        num_experts (`int`, *optional*, defaults to 5): The largest number of experts for each token and layer.
        num_words (`int`, *optional*, defaults to 5): For each expert, the number of tokens that it writes.
        layers (`int` or iterable of `int`, *optional*): Indices of the layers. All layers with experts if `None`.

    Returns:
        `list[TokenExplanation]`: one for each token.

    Raises:
        `ValueError`: if the model has no experts, none in one of the layers, or if the text has no tokens.

    ```python
    >>> for explanation in explain_tokens(model, tokenizer, "A farmer with 12 apples"):
    ...     print(explanation.token, explanation.layers["layer_1"][0])
    ```
    """
    check_integer("num_experts", num_experts)
    check_integer("num_words", num_words)
    reader = ExpertReader(model, layers)
    input_ids = token_ids(tokenizer, text)
    read, _ = reader.read(input_ids=input_ids.to(next(model.parameters()).device))
    layers_of: list[dict[str, list[ExpertUse]]] = [{} for _ in input_ids[0]]
    for label, retrieved in read.items():
        largest = [retrieved.largest(token, num_experts) for token in range(len(layers_of))]
        experts = torch.tensor(sorted({each[0] for uses in largest for each in uses}), dtype=torch.int64)
        raised, lowered = reader.writes(label, experts, num_words)
        place = {int(expert): number for number, expert in enumerate(experts)}
        for own, uses in zip(layers_of, largest, strict=True):
            own[label] = [
                ExpertUse(expert, weight, coefficient, _words(tokenizer, side[place[expert]]))
                for expert, weight, coefficient in uses
                for side in [lowered if coefficient < 0 else raised]
            ]
    return [
        TokenExplanation(token, own) for token, own in zip(_words(tokenizer, input_ids[0]), layers_of, strict=True)
    ]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The tokens of a text: int64, `(1, num_tokens)`. Raises `ValueError` if it has none."""
    if not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {shown(text)}.")
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"].long()
    if not input_ids.numel():
        raise ValueError(f"`text` must have at least one token, got {text!r}.")
    return input_ids


def _words(tokenizer, tokens):
    return tuple(tokenizer.decode([token]) for token in tokens.tolist())


__all__ = ["ExpertUse", "TokenExplanation", "explain_tokens"]
