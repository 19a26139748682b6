# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading the hidden states by which facts are recognized, from a model that does not change."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..analysis.evaluation import evaluation
from ..continual.generated_text import padded, write_on
from ..fact_graft import FactGraft
from ..graft_layer import PREFIX
from .index import FactIndex, first_name


BATCHES_OF_A_FILE = 16
# Number of tokens that the model writes after an answer: the gate must not open there.
TOKENS_BEHIND = 24


@dataclass
class States:
    """Hidden states of prompts, `[num, hidden_size]` each, and the experts of those of answers."""

    questions: list[torch.Tensor] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    residuals: list[torch.Tensor] = field(default_factory=list)
    other_questions: list[torch.Tensor] = field(default_factory=list)
    # Before the end of a question, after an answer, or within an answer to another question.
    elsewhere: list[torch.Tensor] = field(default_factory=list)
    texts: list[torch.Tensor] = field(default_factory=list)

    def add(self, others: dict[str, list]) -> None:
        """Append the states of more prompts."""
        for name, values in others.items():
            getattr(self, name).extend(values)


class StateReader:
    """
    Reads the hidden states at which answers are recognized.

    Args:
        model (`PeftModel`)
        graft ([`FactGraft`]): The graft in the model.
        norm (`nn.Module`): The norm before the model's head.
        index ([`FactIndex`]): The facts and their prompts.
    """

    def __init__(self, model: Any, graft: FactGraft, norm: nn.Module, index: FactIndex):
        self.model, self.graft, self.norm, self.index = model, graft, norm, index
        self.seen: dict[str, torch.Tensor] = {}
        self.files: list[Path] = []

    def read(
        self, sequences: list[list[int]], batch_size: int, checkpoint_dir: str | Path | None, progress_bar: bool
    ) -> States:
        """Read the states of all prompts and texts. `files` in `checkpoint_dir` keep them and are used again."""
        index = self.index
        work: list[tuple] = [(prompt.tokens, (n, form, prompt)) for n, form, prompt in index.prompts]
        work += [(prompt.tokens, (number, None, prompt)) for number, prompt in index.other_prompts]
        work += self._go_on(batch_size, progress_bar)
        work += [(tuple(tokens), None) for tokens in sequences]
        work.sort(key=lambda pair: len(pair[0]))
        found = States()
        hooks = [
            self.graft.register_forward_pre_hook(lambda module, args: self.seen.update(questions=args[0])),
            self.norm.register_forward_pre_hook(lambda module, args: self.seen.update(residuals=args[0])),
        ]
        size = BATCHES_OF_A_FILE * batch_size
        bar = tqdm(total=len(work), desc="Hidden states", disable=not progress_bar)
        with evaluation(self.model, hooks), bar:
            for start in range(0, len(work), size):
                piece = work[start : start + size]
                if checkpoint_dir is None:
                    found.add(self._read_piece(piece, batch_size, bar))
                    continue
                file = Path(checkpoint_dir, f"states-{self._digest(piece)}.pt")
                self.files.append(file)
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    part = file.with_suffix(".part")
                    torch.save(self._read_piece(piece, batch_size, bar), part)
                    part.rename(file)
                found.add(torch.load(file, weights_only=True))
                bar.update(min(start + size, len(work)) - bar.n)
        return found

    def _go_on(self, batch_size, progress_bar):
        """For each fact, a plain prompt with its answer and the text that the model writes after it."""
        plain: dict[int, list] = defaultdict(list)
        for number, form, prompt in self.index.prompts:
            if form == "plain":
                plain[number].append(prompt)
        asked = [own[number % len(own)] for number, own in plain.items()]
        tokens = [prompt.tokens for prompt in asked]
        written = write_on(self.model, tokens, TOKENS_BEHIND, batch_size=batch_size, progress_bar=progress_bar)
        return [
            ((*prompt.tokens, *behind), (number, "plain", prompt))
            for number, prompt, behind in zip(plain, asked, written, strict=True)
        ]

    def _digest(self, piece):
        """A hash of these prompts, the model and the facts, so that files of other states are not used."""
        return hashlib.sha256(repr([self._known, piece]).encode()).hexdigest()[:16]

    @cached_property
    def _known(self):
        base = self.model.get_base_model()
        weights = [each for name, each in base.named_parameters() if PREFIX not in name and not each.is_meta]
        sums = [each.detach().double().sum().item() for each in weights]
        return [base.config.to_json_string(), sums, self.index.descriptions(), self.index.names]

    def _read_piece(self, piece, batch_size, bar):
        """Read the states of some prompts, as the fields of [`States`]."""
        found = States()
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(piece), batch_size):
            batch = piece[start : start + batch_size]
            ids, mask = padded([tokens for tokens, _ in batch])
            device = self.model.device
            self.model.get_decoder()(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for row, (tokens, what) in enumerate(batch):
                states = [
                    self.seen[name][row, : len(tokens)].float().cpu().clone() for name in ("questions", "residuals")
                ]
                self._add(found, tokens, what, *states, generator)
            bar.update(len(batch))
        return vars(found)

    def _add(self, found, tokens, what, questions, residuals, generator):
        """Add the states of one sequence."""
        if what is None:
            found.texts.append(questions)
            return
        index, (number, form, prompt) = self.index, what
        start = prompt.answer_start - 1
        if form is None:
            found.other_questions.append(questions[start : start + 1].clone())
            found.elsewhere.append(questions[start + 1 :].clone())
            return
        if len(tokens) > len(prompt.tokens):
            # The gate may open where the model repeats the answer, or once it names a subject again.
            first = len(prompt.tokens)
            behind = range(first - 1, min(first_name(tokens, first, index.names), len(tokens) - 1))
            found.elsewhere.append(questions[[i for i in behind if tokens[i + 1] not in prompt.answer]])
            return
        found.elsewhere.append(questions[-1:].clone())
        before = torch.randint(max(start, 1), (2,), generator=generator)
        found.elsewhere.append(questions[before[before < start]])
        places = slice(start, len(tokens) - 1)
        found.questions.append(questions[places].clone())
        found.residuals.append(residuals[places].clone())
        first = index.first_expert[number, form]
        found.experts += range(first, first + len(tokens) - 1 - start)
