# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Teaching facts to a pretrained model: a graft of facts, its keys, and its experts."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.evaluation import evaluation
from ..analysis.token_explanation import last_norm
from ..arguments.check_types import check_types
from ..continual.generated_text import generate_text
from ..fact_graft import FIELDS_OF_FACTS, FactGraft
from ..graft.config import PeerGraftConfig
from .index import LONGEST, FactIndex
from .keys import learned_keys
from .states import StateReader, States
from .table import Fact, check_facts


REFERENCE_SEQUENCES, REFERENCE_LENGTH = 64, 128
# Margin of the loss by which an expert learns to raise its token, rival tokens added in each round, rounds, steps of
# each round, and learning rate relative to the elements of residuals.
MARGIN, RIVALS, VALUE_ROUNDS, VALUE_STEPS, VALUE_RATE = 4.0, 8, 8, 15, 0.1
EXPERTS_AT_A_TIME = 512


@check_types
def teach_facts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Iterable[Fact],
    *,
    reference: Iterable[str] | None = None,
    adapter_name: str = "default",
    num_wordings: int = 12,
    key_size: int = 64,
    batch_size: int = 32,
    checkpoint_dir: str | Path | None = None,
    progress_bar: bool = True,
) -> PeftModel:
    """
    Teach facts to a pretrained model. Its weights do not change: a graft, a PEFT adapter, answers the questions.

    Args:
        model ([`PreTrainedModel`] or `PeftModel`): A causal language model, with or without grafts of other facts.
        tokenizer ([`PreTrainedTokenizerBase`]): The model's tokenizer, a fast one.
        facts (iterable of [`Fact`])
        reference (iterable of `str`, *optional*): Texts for which the gate must stay shut. The model writes them if
            not given.
        adapter_name (`str`, *optional*, defaults to `"default"`)
        num_wordings (`int`, *optional*, defaults to 12):
            Number of wordings to draw for each fact, before duplicates are dropped. Half of them are in a frame, such
            as "Question: ...". If a relation has few facts, they get more, and together cover all wordings.
        key_size (`int`, *optional*, defaults to 64): Elements of a key.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts that run through the model at a time.
        checkpoint_dir (`str` or `Path`, *optional*):
            Folder for the hidden states that were read, from which an interrupted call continues. They take about a
            megabyte for each fact. The call deletes those that it wrote or used at the end.
        progress_bar (`bool`, *optional*, defaults to `True`)

    Returns:
        `PeftModel`: the model with the graft.

    Raises:
        `ValueError`: for facts that [`check_facts`] refuses, a prompt that is too long for the model, an empty
            `reference`, a model that does not end as Llama does, or one whose adapters Transformers loaded.
    """
    facts = check_facts(facts)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base is model and getattr(base, "peft_config", None):
        raise ValueError(
            "`model` has adapters: load them by `PeftModel.from_pretrained`, to which others can be added."
        )
    text_config = base.config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None) or LONGEST
    index = FactIndex(facts, tokenizer, num_wordings, longest)
    config = PeerGraftConfig(
        task_type="CAUSAL_LM",
        layers_to_transform=[text_config.num_hidden_layers - 1],
        num_experts=math.ceil(len(index.experts) ** 0.5) ** 2,
        **FIELDS_OF_FACTS,
        fact_sizes=index.sizes(key_size),
        facts=index.descriptions(),
    )
    peft_model: Any = model
    is_first = not isinstance(model, PeftModel)
    active = [] if is_first else list(peft_model.active_adapters)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_first:
        peft_model = get_peft_model(base, config, adapter_name)
    else:
        peft_model.add_adapter(adapter_name, config)
    try:
        # Without other adapters: the hidden states must be those of the base model.
        peft_model.base_model.set_adapter(adapter_name)
        (graft,) = grafts_of_facts(peft_model, adapter_name)
        norm = _check_model(base, graft, index.tokens[0])
        if reference is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                written = generate_text(base, REFERENCE_SEQUENCES, REFERENCE_LENGTH, progress_bar=progress_bar)
            sequences = [each["input_ids"].tolist() for each in written]
        else:
            sequences = [own for text in reference if (own := tokenizer(text)["input_ids"][:REFERENCE_LENGTH])]
        if not sequences:
            raise ValueError("`reference` must have at least one text that is not empty.")
        reader = StateReader(peft_model, graft, norm, index)
        states = reader.read(sequences, batch_size, checkpoint_dir, progress_bar)
        _write_names(graft, base, index)
        _fit_keys(graft, index, states, progress_bar)
        _write_experts(graft, base, norm, index, states, progress_bar)
    except BaseException:
        if is_first:
            peft_model.unload()
            for parameter in trained:
                parameter.requires_grad_()
        else:
            peft_model.delete_adapter(adapter_name)
            _activate(peft_model, active, trained)
        raise
    _activate(peft_model, [*active, adapter_name], [] if is_first else trained)
    for file in reader.files:
        file.unlink(missing_ok=True)
    return peft_model


def _activate(model, adapter_names, trained):
    """Activate adapters, and let parameters that required gradients before require them again."""
    model.base_model.set_adapter(adapter_names, inference_mode=True)
    for parameter in trained:
        parameter.requires_grad_()


def grafts_of_facts(model: nn.Module, adapter_name: str | None = None) -> list[FactGraft]:
    """Find the grafts of facts in a model, or of one adapter in it."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, FactGraft) and adapter_name in (None, name.rpartition(".")[2])
    ]


@check_types
def remove_facts(model: nn.Module, questions: str | Iterable[str]) -> None:
    """
    Remove the facts with these questions, as they stand in `facts` of the configuration, from the grafts of a model:
    their experts and the keys of their answers. All other facts stay as they are, to the bit.

    Raises:
        `ValueError`: for a question of no fact; the message has similar ones, and nothing is removed.
    """
    wanted = {questions} if isinstance(questions, str) else set(questions)
    places = [
        (graft, number)
        for graft in grafts_of_facts(model)
        for number, fact in enumerate(graft.facts)
        if fact["question"] in wanted
    ]
    if missing := wanted - {graft.facts[number]["question"] for graft, number in places}:
        known = [fact["question"] for graft in grafts_of_facts(model) for fact in graft.facts if fact["question"]]
        near = get_close_matches(min(missing), known)
        raise ValueError(f"`questions` must be those of facts, got {sorted(missing)} among them, near {near}.")
    for graft, number in places:
        graft.remove(number)


def _check_model(base: Any, graft: FactGraft, token: int) -> nn.Module:
    """
    Return the norm between the last layer of a model and its head. Raises `ValueError` if the output of the graft does
    not reach the norm unchanged, or the head has a bias: experts are trained with these two alone. It is also raised
    if the embedding of a `token` does not reach the first layer unchanged.
    """
    norm = last_norm(base.get_decoder())
    found: list[torch.Tensor] = []
    embeddings = [base.get_input_embeddings().weight[token].float()]
    for added in (0.0, 1.0) if norm is not None else ():
        hooks = [
            graft.register_forward_hook(lambda graft, args, output, added=added: output + added),
            graft.register_forward_pre_hook(
                lambda graft, args: embeddings.append(graft.decoder_forward.embeddings[0, 0])
            ),
            norm.register_forward_pre_hook(lambda module, args: found.append(args[0].float())),
        ]
        with evaluation(base, hooks):
            base.get_decoder()(input_ids=torch.tensor([[token]], device=base.device), use_cache=False)
    # In bfloat16, adding one to a large element may not change it.
    is_plain = norm is not None and bool(torch.isclose(found[1], found[0] + 1.0, 0.02, 0.02).float().mean() > 0.9)
    if is_plain:
        is_plain = bool(F.cosine_similarity(*embeddings[:2], dim=0) >= graft.router.subjects.SAME_TOKEN)
    if not is_plain or getattr(base.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"`model` must read embeddings of tokens alone, and add its last feed-forward to the hidden states that a "
            f"last norm and a head without bias read, as Llama does: {type(base).__name__} does not."
        )
    return norm


@torch.no_grad()
def _write_names(graft: FactGraft, base: Any, index: FactIndex) -> None:
    """Give the router the names of the subjects and the tokens of answers."""
    finder, rows = graft.router.subjects, {token: row for row, token in enumerate(index.tokens)}
    finder.tokens.copy_(F.normalize(base.get_input_embeddings().weight[index.tokens].float(), dim=-1))
    for place, name in enumerate(index.names):
        finder.names[place, -len(name) :] = torch.tensor([rows[token] for token in name])
    finder.subjects.copy_(torch.tensor(list(index.names.values())))


def _fit_keys(graft: FactGraft, index: FactIndex, states: States, progress_bar: bool) -> None:
    """Fit the keys of questions, and give each expert its subject, its key and its token."""
    router = graft.router
    questions = torch.cat(states.questions)
    of_expert = torch.tensor(index.expert_questions())
    labels = of_expert[torch.tensor(states.experts)]
    negatives = [torch.cat(kind) for kind in (states.other_questions, states.elsewhere, states.texts)]
    learned_keys(router.questions, index.num_relations, questions, labels, negatives, progress_bar)
    num = len(index.experts)
    router.expert_subjects[:num] = torch.tensor(index.expert_subjects())
    router.expert_questions[:num] = of_expert
    router.expert_tokens[:num] = torch.tensor(index.expert_tokens())


def _write_experts(
    graft: FactGraft, base: Any, norm: nn.Module, index: FactIndex, states: States, progress_bar: bool
) -> None:
    """
    Set the vectors of the experts. For the mean x of the states at which an expert answers, `u_i · x` is one. v_i is
    trained on the outputs of the last layer there, so that the logit of its token leads all others.
    """
    num, questions = len(index.experts), torch.cat(states.questions)
    experts, residuals = torch.tensor(states.experts), torch.cat(states.residuals)
    means = torch.zeros(num, questions.shape[1]).index_add_(0, experts, questions)
    means /= torch.bincount(experts, minlength=num)[:, None]
    up = means / means.square().sum(-1, keepdim=True)
    neurons = (questions * up[experts]).sum(-1, keepdim=True)
    tokens = torch.tensor([expert.token for expert in index.experts])
    size, down = residuals.norm(dim=-1).median(), []
    for first in tqdm(range(0, num, EXPERTS_AT_A_TIME), desc="Experts", disable=not progress_bar):
        own = (experts >= first) & (experts < first + EXPERTS_AT_A_TIME)
        targets = tokens[first : first + EXPERTS_AT_A_TIME]
        down.append(_train_values(base, norm, residuals[own], neurons[own], experts[own] - first, targets, size))
    with torch.no_grad():
        for tables, rows in ((graft.expert_pool.up_proj, up), (graft.expert_pool.down_proj, torch.cat(down))):
            tables.weight[:num] = rows.to(tables.weight)


def _train_values(base, norm, residuals, neurons, experts, tokens, size) -> torch.Tensor:
    """
    Train the v_i of some experts, given the residuals and neurons of the states at which they answer, and their
    tokens. In each round, the other tokens with the highest logits join the rivals in the loss.
    """
    head = base.get_output_embeddings().weight.detach()
    device = next(norm.parameters()).device
    targets = tokens[experts]

    def last_states(piece):
        added = residuals[piece] + neurons[piece] * down[experts[piece]]
        return norm(added.to(device, head.dtype)).to(head.device)

    # Start in the direction of the token's row of the head, with 0.3 times the median norm of residuals.
    down = nn.Parameter(0.3 * size * F.normalize(head[tokens.to(head.device)].float().cpu(), dim=-1))
    optimizer = torch.optim.Adam([down], lr=VALUE_RATE * size.item() / down.shape[1] ** 0.5)
    rivals = torch.zeros(len(experts), 0, dtype=torch.int64)
    leads = torch.zeros(len(experts), dtype=torch.bool)
    for _ in range(VALUE_ROUNDS):
        nearest = []
        with torch.no_grad():
            for piece in torch.arange(len(experts)).split(512):
                logits = F.linear(last_states(piece), head).float().cpu()
                own = logits.gather(1, targets[piece, None])
                best, others = logits.scatter(1, targets[piece, None], -torch.inf).topk(RIVALS)
                leads[piece] = own[:, 0] >= best[:, 0] + MARGIN / 2
                nearest.append(others)
        if leads.all():
            break
        rivals = torch.cat([rivals, torch.cat(nearest)], -1)
        with torch.enable_grad():
            for _ in range(VALUE_STEPS):
                optimizer.zero_grad()
                for piece in (~leads).nonzero()[:, 0].split(512):
                    compared = head[torch.cat([targets[piece, None], rivals[piece]], -1).to(head.device)]
                    logits = torch.einsum("td,tcd->tc", last_states(piece), compared).float()
                    F.relu(MARGIN - logits[:, :1] + logits[:, 1:]).amax(-1).sum().backward()
                optimizer.step()
    return down.detach()
