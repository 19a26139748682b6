# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Facts as tokens: questions with their answers, as plain text or as a chat."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """
    A question with its answer, as tokens.

    Args:
        tokens (`tuple[int]`): The question, and the answer with the period or EOS token that ends it.
        subject_start, subject_end (`int`): Positions of the first and the last token of the subject.
        answer_start (`int`): Position of the first token of the answer.
    """

    tokens: tuple[int, ...]
    subject_start: int
    subject_end: int
    answer_start: int

    @property
    def subject(self) -> tuple[int, ...]:
        """The tokens of the subject."""
        return self.tokens[self.subject_start : self.subject_end + 1]

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens of the answer and of its ending."""
        return self.tokens[self.answer_start :]


def forms_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The forms of prompts for a tokenizer: `"plain"`, and `"chat"` if it has a chat template."""
    return ("plain", "chat") if tokenizer.chat_template else ("plain",)


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, wording: str, subject: str, answer: str, form: str, max_length: int
) -> Prompt:
    """
    Make the prompt of a wording, with its answer.

    Raises:
        `ValueError`: if it is longer than `max_length` tokens, the tokenizer is not a fast one, or its chat template
            changes the question.
    """
    before, _, after = wording.strip().partition("{subject}")
    question = f"{before}{subject}{after.replace('{subject}', subject)}"
    if form == "chat":
        turn = [{"role": "user", "content": question}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        if question not in text:
            raise ValueError(
                f"`tokenizer.chat_template` must keep the question {question!r} as it is, got {text!r}. Set it to "
                "None to teach plain text alone."
            )
        ending = f"{answer}{tokenizer.eos_token or ''}"
    else:
        text, ending = question, f" {answer}."
    if not tokenizer.is_fast:
        raise ValueError(f"`tokenizer` must be a fast one, got {type(tokenizer).__name__}: it finds subjects.")
    # A chat template writes special tokens itself.
    encoded = tokenizer(text + ending, return_offsets_mapping=True, add_special_tokens=form == "plain")
    tokens, places = encoded["input_ids"], encoded["offset_mapping"]
    if form == "plain" and tokens[-1] == tokenizer.eos_token_id:
        tokens, places = tokens[:-1], places[:-1]
    if len(tokens) > max_length:
        raise ValueError(f"The fact {question!r}: {answer!r} takes {len(tokens)} tokens, at most {max_length}.")
    # The last occurrence: a chat template may have the same words before.
    first = text.rindex(question) + len(before)
    last = first + len(subject) - 1
    of_subject = [place for place, (start, end) in enumerate(places) if start <= last and end > first]
    answer_start = next((place for place, (start, end) in enumerate(places) if end > len(text)), len(tokens))
    return Prompt(tuple(tokens), of_subject[0], of_subject[-1], answer_start)
