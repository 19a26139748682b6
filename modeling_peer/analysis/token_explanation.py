# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the experts do in a text: which ones each token retrieves, how strongly they answer, and what they write."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments.check_types import check_types
from ..experts import ExpertPool
from ..router import ProductKeyRouter
from .evaluation import evaluation
from .expert_sets import ExpertSet, find_fact_grafts, module_label, select_expert_sets


# The source of a token that no graft of facts gives.
BASE_MODEL = "the base model"

PIECE = 64  # tokens whose expert rows are held at a time


def last_norm(decoder: nn.Module) -> nn.Module | None:
    """Find the norm after the last layer by its usual names in decoders of Transformers, or return `None`."""
    names = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
    return next((module for name in names if (module := getattr(decoder, name, None)) is not None), None)


@dataclass(frozen=True)
class ExpertUse:
    """
    The use of an expert by one token, printed as `expert (coefficient: words)`.

    Args:
        expert (`int`): Its index.
        weight (`float`): Its router weight, summed over the heads that retrieve it.
        coefficient (`float`):
            Factor of its down-projection vector: the router weight times the activation. For PKM, whose values have no
            neuron, it is the router weight.
        words (`tuple[str]`): The tokens whose logits the expert raises most, the largest increase first.
    """

    expert: int
    weight: float
    coefficient: float
    words: tuple[str, ...]

    def __repr__(self):
        return f"{self.expert} ({self.coefficient:+.2g}: {' '.join(map(repr, self.words))})"


@dataclass(frozen=True)
class TokenExplanation:
    """
    The experts of a token, printed as a line for each layer.

    Args:
        token (`str`): The token as text, or its name in the tokenizer if it cannot be shown as text.
        layers (`dict[str, list[ExpertUse]]`):
            For each layer with experts, `"layer_1"` and so on (`"layer_1_default"` for the graft of the adapter of
            this name), the experts with the largest router weights, largest first.
        told_by (`str`):
            The source of the next token: the layer, the adapter and the fact for which the gate is open, such as
            `"layer_29_default: The capital of Norland is Zeli"`, or `"the base model"`.
    """

    token: str
    layers: dict[str, list[ExpertUse]]
    told_by: str = BASE_MODEL

    def __repr__(self):
        lines = [f"{label}: {', '.join(map(repr, uses))}" for label, uses in self.layers.items()]
        lines += [f"told by {self.told_by}"] * (self.told_by != BASE_MODEL)
        return "\n  ".join([repr(self.token), *lines])


@dataclass(frozen=True, eq=False)
class RetrievedExperts:
    """
    The experts that a layer retrieves for the tokens of a sequence, their router weights and coefficients (see
    [`ExpertUse`]), each of shape `(num_tokens, num_active)`. An expert that several heads retrieve is repeated.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    coefficients: torch.Tensor

    def largest(self, token: int | slice, number: int | None = None) -> list[tuple[int, float, float]]:
        """
        Return the experts with the largest weights for a token, or for several together, all if `number` is `None`.
        Each occurs once, with its index, weight and coefficient, the largest weight first.
        """
        experts, places = self.experts[token].unique(return_inverse=True)
        weights, coefficients = (
            torch.zeros(len(experts)).index_add_(0, places.flatten(), each[token].flatten())
            for each in (self.weights, self.coefficients)
        )
        order = weights.argsort(descending=True, stable=True)[:number]
        return [
            (int(experts[each]), weights[each].item(), coefficients[each].item()) for each in order if weights[each]
        ]


class ExpertReader:
    """
    Reads what the experts of a causal language model do, in all layers or some of them, in one process. `sets` are the
    experts of each layer by its label; layers that share a pool have the same set.
    """

    def __init__(self, model: Any, layers: Iterable[int] | int | None = None):
        self.model = model
        modules = dict(model.named_modules())
        names = {module: name for name, module in modules.items()}
        self.sets: dict[str, ExpertSet] = {}
        self._label_of: dict[ProductKeyRouter, str] = {}
        self._pools_of: dict[str, dict[int, Any]] = {}  # by index of the first expert; for PKM, the layer
        try:
            sets = select_expert_sets(model, layers)
        except ValueError:
            if layers is not None or not find_fact_grafts(model):
                raise
            sets = {}
        for name, experts in sets.items():
            pools = {each.first_expert: each for each in modules[name].modules() if isinstance(each, ExpertPool)}
            for router in experts.routers:
                label = self._label_of[router] = module_label(modules, names[router])
                self.sets[label], self._pools_of[label] = experts, pools or {0: modules[name]}
        if self.model.get_output_embeddings() is None:
            raise ValueError(f"`model` must predict tokens, got {type(model).__name__} without output embeddings.")
        self.num_positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
        """
        Tokenize a text: int64, `(1, num_tokens)`, on the device of the model. Raises `ValueError` if there are no
        tokens, or more than the model has positions.
        """
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"].long()
        if not input_ids.numel():
            raise ValueError("`text` must have at least one token.")
        if input_ids.numel() > (self.num_positions or input_ids.numel()):
            raise ValueError(
                f"`text` must have at most {self.num_positions} tokens, the positions of the model, got "
                f"{input_ids.numel()}."
            )
        return input_ids.to(next(self.model.parameters()).device)

    def routers(self, label: str) -> list[ProductKeyRouter]:
        """The routers of a layer, one for each generation."""
        return [router for router, own in self._label_of.items() if own == label]

    def read(self, **inputs: Any) -> tuple[dict[str, RetrievedExperts], torch.Tensor]:
        """
        Run the model in evaluation mode on one sequence: `input_ids` of shape `(1, num_tokens)`, or other inputs.
        Returns the [`RetrievedExperts`] of each layer, on the CPU, and float32 logits, `(num_tokens, vocab_size)`.
        """
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {label: [] for label in self.sets}

        def observe(router, args, output):
            found[self._label_of[router]].append(self._coefficients(router, args[0], *output))

        hooks = [router.register_forward_hook(observe) for router in self._label_of]
        with evaluation(self.model, hooks):
            logits = self.model(**inputs).logits[0].float()
        read = {
            label: RetrievedExperts(*(torch.cat(parts, dim=1) for parts in zip(*several, strict=True)))
            for label, several in found.items()
            if several
        }
        return read, logits

    def _coefficients(self, router, hidden_states, indices, weights):
        tokens = hidden_states.flatten(0, -2)
        indices, weights = (each.flatten(-2).flatten(0, -2) for each in (indices, weights))
        pool, coefficients = self._pools_of[self._label_of[router]][router.generation.first_expert], weights
        if isinstance(pool, ExpertPool):
            rows = indices - pool.first_expert
            neurons = _dot_products(tokens, rows, pool.up_proj)
            if pool.gate_proj is None:
                coefficients = weights * pool.act_fn(neurons)
            else:
                coefficients = weights * pool.act_fn(_dot_products(tokens, rows, pool.gate_proj)) * neurons
        return indices.cpu(), weights.float().cpu(), coefficients.float().cpu()

    @torch.no_grad()
    def down_projections(self, label: str, experts: torch.Tensor) -> torch.Tensor:
        """The down-projection vectors of some experts of a layer, in the dtype of the output embeddings."""
        head = self.model.get_output_embeddings().weight
        pools = self._pools_of[label]
        firsts = torch.tensor(sorted(pools))
        own = firsts[torch.searchsorted(firsts, experts, right=True) - 1]
        vectors = head.new_empty(len(experts), head.shape[1])
        for first, pool in pools.items():
            table: Any = pool.down_proj if isinstance(pool, ExpertPool) else pool.values
            chosen = (own == first).nonzero()[:, 0]
            # By a call of the table, which an adapter, a quantizer or an offloader may have wrapped.
            rows = table((experts[chosen] - first).to(_device_of(table, head)))
            vectors[chosen.to(head.device)] = rows[:, : head.shape[1]].to(vectors)  # a graft's may end with a bias
        return vectors

    @torch.no_grad()
    def writes(self, label: str, experts: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Find the tokens whose logits the down-projection vector of each expert raises or lowers most, if the last
        norm reads it alone ("logit lens"). Returns ids, two tensors of shape `(num_experts, number)`.
        """
        vectors, decoder = self.down_projections(label, experts), self.model.get_decoder()
        norm = last_norm(decoder)
        logits = self.model.get_output_embeddings()(vectors if norm is None else norm(vectors)).float()
        number = min(number, logits.shape[1])
        return tuple(logits.topk(number, largest=largest).indices.cpu() for largest in (True, False))


def _dot_products(tokens, rows, table):
    """`tokens [T, d], rows [T, A] -> [T, A]`"""
    pieces = zip(tokens.split(PIECE), rows.to(_device_of(table, rows)).split(PIECE), strict=True)
    return torch.cat([torch.einsum("td,tad->ta", some, table(own).to(some)) for some, own in pieces])


def _device_of(table, tensor):
    """The device on which a table looks up rows: for an offloaded table, the device of `tensor`."""
    device = next(table.parameters()).device
    return tensor.device if device.type == "meta" else device


@check_types
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
    Find which experts the tokens of a text use, and which tokens these experts write.

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
        `ValueError`:
            if the model has no experts, or none in one of the layers, or if the text has no tokens, or more than the
            model has positions.

    ```python
    >>> for explanation in explain_tokens(model, tokenizer, "A farmer with 12 apples"):
    ...     print(explanation)
    ```
    """
    if min(num_experts, num_words) < 1:
        raise ValueError(f"`num_experts` and `num_words` must be positive, got {num_experts} and {num_words}.")
    reader = ExpertReader(model, layers)
    input_ids = reader.token_ids(tokenizer, text)
    read, _ = reader.read(input_ids=input_ids)
    layers_of: list[dict[str, list[ExpertUse]]] = [{} for _ in input_ids[0]]
    for label, retrieved in read.items():
        largest = [retrieved.largest(token, num_experts) for token in range(len(layers_of))]
        experts = torch.tensor(sorted({each[0] for uses in largest for each in uses}), dtype=torch.int64)
        raised, lowered = reader.writes(label, experts, num_words)
        place = {int(expert): number for number, expert in enumerate(experts)}
        for own, uses in zip(layers_of, largest, strict=True):
            own[label] = [
                ExpertUse(expert, weight, coefficient, tuple(token_texts(tokenizer, side[place[expert]])))
                for expert, weight, coefficient in uses
                for side in [lowered if coefficient < 0 else raised]
            ]
    tokens = token_texts(tokenizer, input_ids[0])
    return [
        TokenExplanation(*each) for each in zip(tokens, layers_of, told_by(model, input_ids=input_ids), strict=True)
    ]


def told_by(model: Any, **inputs: Any) -> list[str]:
    """Find the source of the next token at each token, see [`TokenExplanation`]; of several grafts, the last."""
    found: list[str] = [BASE_MODEL] * inputs["input_ids"].shape[1]
    grafts = find_fact_grafts(model)

    def note(label, graft, router, args, output):
        experts, weights = (each[0, :, 0, 0].tolist() for each in output)
        for token, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            if weight and found[token] == BASE_MODEL:  # the last graft runs first
                fact = graft.fact_of(expert)
                found[token] = f"{label}: {fact['question']} {fact['answer']}"

    hooks = [graft.router.register_forward_hook(partial(note, label, graft)) for label, graft in grafts.items()]
    with evaluation(model, hooks):
        if grafts:
            model(**inputs)
    return found


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> list[str]:
    """Tokens as text; the name in the tokenizer for a part of a character or a control character."""
    words = [tokenizer.decode([token]) for token in tokens.tolist()]
    return [
        word
        if "\ufffd" not in word and all(each.isprintable() or each.isspace() for each in word)
        else tokenizer.convert_ids_to_tokens(token)
        for word, token in zip(words, tokens.tolist(), strict=True)
    ]
