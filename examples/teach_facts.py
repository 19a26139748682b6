# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Teaches facts to a pretrained model of the Llama type, which stays unchanged: writes a PEFT adapter that answers when
one of the facts is asked for.

    python examples/teach_facts.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --facts_file facts.csv \
        --output_dir runs/facts

`facts.csv` has the columns `subject`, `relation` and `answer`, as "Norland, capital, Zeli". A relation may have
several names, "capital|seat of government". In place of the relation there may be a `question` that contains the
subject.
--known_file is a table of facts that the model may know already, to see how many of them it keeps.

The script prints what the model answers before and after, and saves the adapter with these figures, in its card and
as `teaching.json`. If it is interrupted, the same command resumes.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.evaluation import held_out_loss
from common.machine import machine
from common.model_arguments import check_output_dir
from modeling_peer import Fact, generate_text, read_facts, teach_facts
from modeling_peer.facts.measuring import are_answered, openings, prompts_of
from modeling_peer.facts.prompts import forms_of
from modeling_peer.facts.table import SUBJECT
from modeling_peer.graft.card import write_adapter_card
from modeling_peer.graft_layer import PREFIX
from studies.common.study_folder import write_json


# Frames that are not taught, and the number of own wordings of each fact that are asked.
OTHER_FRAMES = ("I wonder: {}", "Could you help me? {}")
NUM_ASKED = 3
# Other questions about the subjects, in wordings that are not trained as negatives.
OTHER_QUESTIONS = (
    "Tell me something about {subject}.",
    "What is the best thing about {subject}?",
    "Describe {subject}.",
    "{subject} has a long history of",
)
NUM_SHOWN = 10  # questions that the card shows, and unanswered ones that are printed
# Names that no fact has, for which the gate should stay shut.
OTHER_NAMES = ("Ostrania", "Mount Kelvar", "Lena Tarvik", "Tobias Orlen", "Quandor", "the Velmar Institute")
TEXTS, TEXT_LENGTH = 32, 128
FIGURES = "teaching.json"  # written last


@dataclass
class FactsArguments:
    """Which facts are taught to which model, and where the adapter goes."""

    model_name_or_path: str = field(metadata={"help": "A causal language model: a folder or an id of the Hub."})
    facts_file: str = field(metadata={"help": "The facts, a CSV file or JSONL."})
    known_file: str | None = field(
        default=None, metadata={"help": "Facts that the model may know, in the form of --facts_file."}
    )
    output_dir: str = field(default="runs/facts", metadata={"help": "Folder of the adapter."})
    num_wordings: int = field(
        default=12, metadata={"help": "Wordings of each fact that are learned; more where a relation has few facts."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts that run through the model at a time."})

    def __post_init__(self):
        if Path(self.output_dir, FIGURES).exists():
            raise UsageError(f"--output_dir {self.output_dir} has facts: choose another folder.")


def is_taught(folder: Path, facts: list[Fact], base_model: str) -> bool:
    """Whether a folder has an adapter of these facts for a model. Raises `UsageError` if it has something else."""
    check_output_dir(str(folder), base_model)
    if not (folder / "adapter_config.json").exists():
        if (folder / "README.md").exists():
            raise UsageError(
                f"--output_dir {folder} has a README.md, which a card would replace: choose another folder."
            )
        return False
    config = PeftConfig.from_pretrained(folder)
    known = [(each["question"], each["answer"]) for each in getattr(config, "facts", None) or []]
    if config.base_model_name_or_path != base_model or known != [(fact.question, fact.answer) for fact in facts]:
        raise UsageError(f"--output_dir {folder} has another adapter: choose another folder.")
    return True


def asked(facts: list[Fact]) -> list[Fact]:
    """The facts with the first `NUM_ASKED` of their own wordings."""
    return [replace(fact, wordings=fact.wordings[:NUM_ASKED]) for fact in facts]


def in_other_frames(facts: list[Fact]) -> list[Fact]:
    """The facts in frames that are not taught."""
    return [replace(fact, wordings=tuple(frame.format(fact.wordings[0]) for frame in OTHER_FRAMES)) for fact in facts]


def about_others(facts: list[Fact]) -> list[Fact]:
    """The questions of the facts, asked about names that no fact has."""
    relations = dict.fromkeys(fact.wordings[:NUM_ASKED] for fact in facts)
    names = [name for name in OTHER_NAMES if not any(fact.subject in name for fact in facts)]
    return [Fact(name, "", wordings) for wordings in relations for name in names]


def other_questions(facts: list[Fact]) -> list[Fact]:
    """Questions about the subjects of the facts that none of them answers."""
    return [Fact(subject, "", OTHER_QUESTIONS) for subject in dict.fromkeys(fact.subject for fact in facts)]


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: list[Fact], batch_size: int
) -> dict[str, bool]:
    """Whether the model answers each fact in each wording and form, by the text of the question."""
    prompts = [prompt for form in forms_of(tokenizer) for prompt in prompts_of(tokenizer, facts, form)]
    questions = [
        f"{form}: {wording.replace(SUBJECT, fact.subject)}"
        for form in forms_of(tokenizer)
        for fact in facts
        for wording in fact.wordings
    ]
    return dict(zip(questions, are_answered(model, prompts, batch_size=batch_size), strict=True))


def opens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: list[Fact], batch_size: int) -> float:
    """The share of questions at whose end the gate opens."""
    prompts = [prompt for form in forms_of(tokenizer) for prompt in prompts_of(tokenizer, facts, form)]
    found = openings(model, [each.tokens[: each.answer_start] for each in prompts], batch_size=batch_size)
    return sum(each[-1].item() for each in found) / len(found)


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, list[Fact]],
    texts: torch.Tensor,
    batch_size: int,
) -> dict[str, Any]:
    """Which facts of each set a model answers, and its loss on texts, in nats per token."""
    answered = {name: answers(model, tokenizer, facts, batch_size) for name, facts in sets.items()}
    return {"answered": answered, "text": held_out_loss(model, texts, desc="Text")}


def rows_of(figures: dict[str, Any], num_facts: int) -> list[tuple[str, str, str]]:
    """The figures as rows of a table."""
    before, after, size = figures["before"], figures["after"], figures["bytes"]
    rows = [("", "before", "after")]
    for name, asked_before in before["answered"].items():
        known, now = (list(each.values()) for each in (asked_before, after["answered"][name]))
        rows.append((f"answered, {name}", f"{sum(known) / len(known):.1%}", f"{sum(now) / len(now):.1%}"))
        if name == "known" and any(known):
            kept = sum(a and b for a, b in zip(known, now, strict=True)) / sum(known)
            rows.append(("of what was known, kept", "", f"{kept:.1%}"))
    rows.append(("opens for other names", "", f"{figures['opens_for_other_names']:.1%}"))
    rows.append(("opens for other questions", "", f"{figures['opens_for_other_questions']:.1%}"))
    rows.append(("text, nats per token", f"{before['text']:.4f}", f"{after['text']:.4f}"))
    rows.append(("bytes of the adapter", "", f"{size:,}, {size // num_facts:,} a fact"))
    return rows


CARD = """

## Facts

{number} facts, which `adapter_config.json` lists; their relations are asked for as in these questions:

{questions}

{table}

A fact is answered where its subject stands as it is written there, and the question has words of the relation. It is
not used in reasoning. Within `with model.disable_adapter():` the model is the base model.
"""


def write_card(folder: Path, base_model: str, rows: list[tuple[str, str, str]], facts: list[Fact]) -> None:
    """Writes the card of an adapter: how to load it, which facts it has, and what was measured."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    questions = {fact.wordings: f"- {fact.question} {fact.answer}" for fact in reversed(facts)}
    shown = list(reversed(questions.values()))[:NUM_SHOWN]
    table = "\n".join([lines[0], "|---|---|---|", *lines[1:]])
    text = CARD.format(number=len(facts), questions="\n".join(shown), table=table)
    card = folder / "README.md"
    card.unlink(missing_ok=True)  # PEFT's card is a template to fill in
    write_adapter_card(folder, base_model, "CAUSAL_LM")
    card.write_text(card.read_text(encoding="utf-8").rstrip() + text, encoding="utf-8")


@ends_on_usage_error(ValueError, OSError)
def main():
    (args,) = parse_arguments((FactsArguments,), __doc__)
    logging.set_verbosity_error()
    start, folder = time.time(), Path(args.output_dir)
    facts = read_facts(args.facts_file)
    sets = {"as taught": asked(facts), "in other frames": in_other_frames(facts)}
    if args.known_file is not None:
        sets["known"] = asked(read_facts(args.known_file))
    was_taught = is_taught(folder, facts, args.model_name_or_path)  # by a run that stopped while measuring
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path).eval()
    print("What the model writes, and what it answers before ...")
    texts = torch.stack([each["input_ids"] for each in generate_text(model, TEXTS, TEXT_LENGTH)])
    before = measure(model, tokenizer, sets, texts, args.batch_size)
    if not was_taught:
        sizes = {"num_wordings": args.num_wordings, "batch_size": args.batch_size}
        taught = teach_facts(model, tokenizer, facts, **sizes, checkpoint_dir=folder)
        save_adapter(taught, folder)
        model = taught.unload()
    model = PeftModel.from_pretrained(model, folder).eval()
    print("What it answers now ...")
    after = measure(model, tokenizer, sets, texts, args.batch_size)
    others = opens(model, tokenizer, about_others(facts), args.batch_size)
    vague = opens(model, tokenizer, other_questions(facts), args.batch_size)
    tokenizer.save_pretrained(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    figures = {"before": before, "after": after, "bytes": size}
    figures |= {"opens_for_other_names": others, "opens_for_other_questions": vague}
    figures |= {"seconds": time.time() - start, "machine": machine()}
    rows = rows_of(figures, len(facts))
    write_card(folder, args.model_name_or_path, rows, facts)
    write_json(folder / FIGURES, figures)
    lines = "\n".join(f"{name:<28}{first:>12}{second:>28}" for name, first, second in rows)
    if missed := [question for question, is_right in after["answered"]["as taught"].items() if not is_right]:
        lines += f"\n\nWithout the answer are {len(missed)} questions, which {FIGURES} lists:\n  "
        lines += "\n  ".join(missed[:NUM_SHOWN]) + '\nMore names of their relations help, as in "maker|producer".'
    print(f"""
{lines}

{len(facts)} facts in {figures["seconds"]:.0f} seconds. In {folder}: the adapter, its card and {FIGURES}.
What to do next:
  ./run python examples/run_generation.py --model_name_or_path {folder} --max_new_tokens 12 \\
      --prompt "{facts[0].question}"
  hf upload USER/facts {folder}""")


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Saves an adapter in bfloat16."""
    state = {name: each for name, each in model.state_dict().items() if PREFIX in name}
    model.save_pretrained(
        folder,
        state_dict={name: each.bfloat16() if each.is_floating_point() else each for name, each in state.items()},
    )


if __name__ == "__main__":
    main()
