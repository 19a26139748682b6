# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model answers, and where the gates of its grafts of facts open."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.evaluation import evaluation
from ..fact_graft import FactRouter
from .index import LONGEST
from .prompts import Prompt, make_prompt
from .table import Fact


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], form: str, wordings: Sequence[str] | None = None
) -> list[Prompt]:
    """The prompts of facts in a form: in all of their own wordings, or in others, which have `{subject}` in them."""
    return [
        make_prompt(tokenizer, wording, fact.subject, fact.answer, form, LONGEST)
        for fact in facts
        for wording in wordings or fact.wordings
    ]


def are_answered(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Prompt], *, batch_size: int = 32, progress_bar: bool = True
) -> list[bool]:
    """Whether greedy decoding answers each prompt, to the end of the answer."""
    right = [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].tokens))
    with evaluation(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Answers", disable=not progress_bar):
            own = order[start : start + batch_size]
            ids, mask = padded([prompts[place].tokens for place in own])
            # Of all answers of a batch, the tokens before the longest one predict nothing that is asked.
            kept = max(len(prompts[place].answer) + ids.shape[1] - len(prompts[place].tokens) for place in own) + 1
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_to_keep=kept,
                use_cache=False,
            ).logits
            found = logits.argmax(-1).cpu()
            first = ids.shape[1] - found.shape[1]
            for row, place in enumerate(own):
                prompt = prompts[place]
                predicted = found[row, prompt.answer_start - 1 - first : len(prompt.tokens) - 1 - first]
                right[place] = predicted.tolist() == list(prompt.answer)
    return right


def padded(sequences: Sequence[Sequence[int]], padding_side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of tokens as one batch, padded on one side, and its attention mask."""
    rows = [torch.tensor(tokens) for tokens in sequences]
    pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
    return pad(rows), pad([torch.ones_like(row) for row in rows])


def write_on(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    batch_size: int = 32,
    progress_bar: bool = True,
) -> list[list[int]]:
    """What a model writes behind each prompt by greedy decoding, `num_tokens` whether a text ends before or not."""
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # A generation configuration holds for all that a call of `generate` does not name, so it is replaced.
    own, base.generation_config = base.generation_config, GenerationConfig(pad_token_id=0)
    try:
        with evaluation(model):
            for start in tqdm(range(0, len(order), batch_size), desc="Written", disable=not progress_bar):
                some = order[start : start + batch_size]
                ids, mask = padded([prompts[place] for place in some], padding_side="left")
                tokens = base.generate(
                    ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=num_tokens,
                    do_sample=False,
                )
                for place, written in zip(some, tokens[:, ids.shape[1] :].tolist(), strict=True):
                    found[place] = written
    finally:
        base.generation_config = own
    return found


def openings(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    progress_bar: bool = True,
) -> list[torch.Tensor]:
    """
    For each sequence of tokens, where the gate of a graft of facts that is active opens: bool, `(num_tokens,)`. The
    last place is that at which an answer begins.
    """
    found: list[torch.Tensor] = [torch.zeros(len(tokens), dtype=torch.bool) for tokens in sequences]
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    seen: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, FactRouter)]
    hooks = [
        router.register_forward_hook(lambda module, args, output: seen.append(output[1][..., 0, 0].cpu() > 0))
        for router in routers
    ]
    with evaluation(model, hooks):
        for start in tqdm(range(0, len(order), batch_size), desc="Openings", disable=not progress_bar):
            own = order[start : start + batch_size]
            ids, mask = padded([sequences[place] for place in own])
            seen.clear()
            model.get_decoder()(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
            for each in seen:
                for row, place in enumerate(own):
                    found[place] |= each[row, : len(sequences[place])]
    return found
