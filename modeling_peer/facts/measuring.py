# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model answers, and where the gates of its grafts of facts open."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.evaluation import evaluation
from ..continual.generated_text import padded
from ..fact_graft import FactRouter
from .index import LONGEST
from .prompts import Prompt, make_prompt
from .table import Fact


def prompts_of(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], form: str) -> list[Prompt]:
    """Make the prompts of facts in one form, in all wordings of each fact."""
    return [
        make_prompt(tokenizer, wording, fact.subject, fact.answer, form, LONGEST)
        for fact in facts
        for wording in fact.wordings
    ]


def are_answered(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Prompt], *, batch_size: int = 32, progress_bar: bool = True
) -> list[bool]:
    """Tell for each prompt whether greedy decoding gives the whole answer."""
    right = [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].tokens))
    with evaluation(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Answers", disable=not progress_bar):
            own = order[start : start + batch_size]
            ids, mask = padded([prompts[place].tokens for place in own])
            # Logits are needed only from the token before the earliest answer of the batch on.
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


def openings(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    progress_bar: bool = True,
) -> list[torch.Tensor]:
    """
    Find where the gate of any active graft of facts opens in each sequence of tokens: bool, `(num_tokens,)`. A gate
    that opens at a token gives the next one, so the last element tells whether an answer follows the sequence.
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
