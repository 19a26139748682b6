# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What all runs of the study of facts share: the facts, the texts and the base model, and how a model is measured."""

import random
from collections import Counter, defaultdict
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.text_data import DataTrainingArguments, tokenize_into_blocks
from studies.common.base_model import MODEL_PACKAGE, save_base
from studies.common.corpora import load_corpus
from studies.common.study_folder import read_json, write_json
from studies.facts.factbook import RELATIONS, Fact, load_facts
from studies.facts.sentences import Sentence, ask, make_sentence


# By how much the loss of facts that are chosen again may differ from the measured one, in nats per token: batches and
# threads round otherwise.
LOSS_TOLERANCE = 0.05


@dataclass
class FactsArguments:
    """Which model learns how much, and what is measured."""

    output_dir: str = field(default="runs/facts", metadata={"help": "Output folder."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Base model, by its id or folder. Defaults to the package {MODEL_PACKAGE} of PyPI."},
    )
    texts: list[str] = field(
        default_factory=lambda: ["brown", "python-docs", "perl-docs"],
        metadata={
            "help": "Held-out texts to measure forgetting on, by their names in studies/common/corpora.py or ids of "
            "the Hub."
        },
    )
    background_texts: list[str] = field(
        default_factory=lambda: ["prose", "linux-docs"],
        metadata={"help": "Other texts, which show what experts of a graft general text uses."},
    )
    num_new: int = field(
        default=240, metadata={"help": "Maximum number of facts to learn, the same number of each relation."}
    )
    num_known: int = field(
        default=100, metadata={"help": "Maximum number of known facts of each kind to measure forgetting on."}
    )
    untaught_relations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Relations of which no fact is taught, by their names in studies/facts/factbook.py: known facts of "
            "these are asked apart from those of the other relations."
        },
    )
    chosen: str | None = field(
        default=None,
        metadata={
            "help": "A results.json of this study: the hyperparameters that it chose are run with all seeds, none are "
            "swept, and none of the facts that it taught are taught."
        },
    )
    min_loss: float = field(
        default=2.0,
        metadata={"help": "Minimum loss, in nats per token, of the answer to a fact that counts as unknown."},
    )
    steps: int = field(default=64, metadata={"help": "Number of training steps."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per step."})
    measurements: int = field(default=4, metadata={"help": "Number of measurements of a run, at growing distances."})
    eval_blocks: int = field(default=6, metadata={"help": "Held-out sequences per text, of 256 tokens each."})
    background_blocks: int = field(default=96, metadata={"help": "Sequences per background text, of 256 tokens each."})
    seeds: int = field(
        default=3, metadata={"help": "Number of seeds for the chosen hyperparameters of each arm. All others get one."}
    )
    full_precision: bool = field(default=False, metadata={"help": "Compute in float32 instead of bfloat16 autocast."})
    graft_layers: list[int] = field(default_factory=lambda: [3, 7, 11], metadata={"help": "Layers that get a graft."})
    num_experts: int = field(default=256**2, metadata={"help": "Number of experts of each graft."})

    def __post_init__(self):
        if unknown := set(self.untaught_relations) - set(RELATIONS):
            raise ValueError(
                f"--untaught_relations must be some of {list(RELATIONS)}, got {sorted(unknown)} among them."
            )


@dataclass
class Study:
    """
    What all runs share.

    Args:
        args (`FactsArguments`): Arguments of the study.
        folder (`Path`): Folder with the base model in `base` and its graft in `graft`.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the base model.
        taught (`list[Sentence]`): Sentences that teach the new facts.
        asked (`dict[str, list[Sentence]]`):
            Sentences that test facts of each kind of [`choose_facts`], `"new"` ones in other words than taught.
        texts (`dict[str, torch.Tensor]`): Held-out blocks of each text, of shape `(num_blocks, 256)`.
        background (`Dataset`): Blocks of general text.
    """

    args: FactsArguments
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    taught: list[Sentence]
    asked: dict[str, list[Sentence]]
    texts: dict[str, torch.Tensor]
    background: Dataset

    def load_model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32).eval()

    def autocast(self) -> Any:
        return nullcontext() if self.args.full_precision else torch.autocast("cpu", torch.bfloat16)


def choose_facts(
    facts: list[Fact],
    losses: torch.Tensor,
    matches: torch.Tensor,
    args: FactsArguments,
    without: Collection[Fact] = (),
) -> dict[str, list[Fact]]:
    """
    Chooses facts that a model does not know, and facts that it knows, those of relations that are not taught apart.

    Args:
        facts (`list[Fact]`): All facts.
        losses (`torch.Tensor` of shape `(num_facts, num_sentences)`):
            Losses of the sentences of each fact, from [`ask`].
        matches (`torch.Tensor` of shape `(num_facts, num_sentences)`):
            Matches of the sentences of each fact, from [`ask`].
        args (`FactsArguments`): Arguments with `min_loss`, `num_new`, `num_known` and `untaught_relations`.
        without (`Collection[Fact]`, *optional*): Facts that are not to be taught.

    Returns:
        `dict[str, list[Fact]]`: Facts of each kind.

        - `"new"`: at most `num_new` facts of which no sentence was matched and each had a loss of at least `min_loss`,
          spread as evenly as possible over the relations that are not in `untaught_relations`.
        - `"known"`: at most `num_known` facts of which every sentence was matched. If there are `untaught_relations`,
          their relation is that of a new fact.
        - `"known_elsewhere"`, if there are `untaught_relations`: at most `num_known` such facts of other relations.

    Raises:
        `ValueError`: if there is no fact of one of these kinds.
    """
    is_new = ~matches.any(1) & (losses.min(1).values >= args.min_loss)
    is_known = matches.all(1)
    generator = random.Random(0)
    new = defaultdict(list)
    known = []
    for i in generator.sample(range(len(facts)), len(facts)):
        if is_new[i] and facts[i].relation not in args.untaught_relations and facts[i] not in without:
            new[facts[i].relation].append(facts[i])
        elif is_known[i]:
            known.append(facts[i])
    taught = []
    while len(taught) < args.num_new and any(new.values()):
        taught += [of_relation.pop() for of_relation in new.values() if of_relation]
    chosen = {"new": taught[: args.num_new], "known": known}
    if args.untaught_relations:
        relations = {fact.relation for fact in chosen["new"]}
        chosen["known"] = [fact for fact in known if fact.relation in relations]
        chosen["known_elsewhere"] = [fact for fact in known if fact.relation not in relations]
    chosen |= {kind: found[: args.num_known] for kind, found in chosen.items() if kind != "new"}
    if empty := [kind for kind, found in chosen.items() if not found]:
        unknown_of, known_of = (
            dict(Counter(fact.relation for fact, found in zip(facts, which, strict=True) if found))
            for which in (is_new, is_known)
        )
        raise ValueError(
            f"The study needs facts of each kind, found none that are {empty}. New to the model, at --min_loss "
            f"{args.min_loss}, are {unknown_of}; known to it are {known_of}. Choose --untaught_relations, now "
            f"{args.untaught_relations}, so that it knows facts of these (known_elsewhere), and both has new facts and "
            "knows some of other relations (new, known); or change --min_loss, --num_new or --num_known."
        )
    return chosen


def arguments_of(results: Path) -> FactsArguments:
    """The arguments of an earlier study, from its `results.json`. Those that it did not have yet are the defaults."""
    saved = read_json(results)["arguments"]
    return FactsArguments(**{each.name: saved[each.name] for each in fields(FactsArguments) if each.name in saved})


def check_earlier(args: FactsArguments) -> None:
    """
    Raises `ValueError` if the study of `args.chosen` asked another model, or in another precision: which facts that
    taught could not be said.
    """
    earlier = arguments_of(Path(args.chosen))
    for name in ("model_name_or_path", "full_precision"):
        if getattr(earlier, name) != getattr(args, name):
            raise ValueError(
                f"--chosen {args.chosen} is of a study with {name} {getattr(earlier, name)!r}, got "
                f"{getattr(args, name)!r}: what it taught is asked of the same model again."
            )


def taught_earlier(facts: list[Fact], losses: torch.Tensor, matches: torch.Tensor, results: Path) -> list[Fact]:
    """
    The facts that an earlier study taught, as its choice, which is deterministic, falls on what a model answers now, see
    [`choose_facts`]. Raises `ValueError` if their loss is not the one that it measured, so that they are others.
    """
    found = choose_facts(facts, losses, matches, arguments_of(results))["new"]
    loss = losses[[facts.index(fact) for fact in found]].mean().item()
    measured = read_json(results)["runs"][0]["points"][0]["new"]["loss"]
    if abs(loss - measured) > LOSS_TOLERANCE:
        raise ValueError(
            f"What the study of {results} taught had a loss of {measured:.3f} nats before; chosen again, it has "
            f"{loss:.3f}, so the facts or the model are others. Run the study without --chosen."
        )
    return found


def load_study(args: FactsArguments, folder: Path) -> Study:
    """Loads what all runs share. The choice of facts is saved in `facts.json`."""
    save_base(args.model_name_or_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    options = DataTrainingArguments()

    def blocks(name, split, number):
        found = tokenize_into_blocks(load_corpus(name)[split], tokenizer, 256, options).shuffle(seed=0)
        return found.select(range(min(number, len(found))))

    texts = {name: torch.tensor(blocks(name, "validation", args.eval_blocks)["input_ids"]) for name in args.texts}
    background = [blocks(name, "train", args.background_blocks) for name in args.background_texts]
    study = Study(args, folder, tokenizer, [], {}, texts, concatenate_datasets(background).shuffle(seed=0))
    file = folder / "facts.json"
    if not file.exists():
        facts = load_facts()
        sentences = [make_sentence(tokenizer, text, fact.answer) for fact in facts for text in fact.asked]
        with study.autocast():
            losses, matches = ask(study.load_model(), tokenizer, sentences)
        asked = facts, losses.view(len(facts), -1), matches.view(len(facts), -1)
        earlier = taught_earlier(*asked, Path(args.chosen)) if args.chosen else ()
        chosen = choose_facts(*asked, args, earlier)
        write_json(file, {kind: [asdict(fact) for fact in found] for kind, found in chosen.items()})
    chosen = {kind: [Fact(**fact) for fact in facts] for kind, facts in read_json(file).items()}
    study.taught = [make_sentence(tokenizer, text, fact.answer) for fact in chosen["new"] for text in fact.taught]
    for kind, facts in chosen.items():
        study.asked[kind] = [make_sentence(tokenizer, text, fact.answer) for fact in facts for text in fact.asked]
    return study


@torch.no_grad()
def measure(model: nn.Module, study: Study) -> dict[str, Any]:
    """
    Returns loss and share of matches of each kind of facts of [`choose_facts`], and the loss of each text. Losses are
    in nats per token.
    """
    was_training = model.training
    model.eval()
    result: dict[str, Any] = {"texts": {}}
    with study.autocast():
        for kind, sentences in study.asked.items():
            losses, matches = ask(model, study.tokenizer, sentences)
            result[kind] = {"loss": losses.mean().item(), "matches": matches.float().mean().item()}
        for name, blocks in study.texts.items():
            losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in blocks.split(4)]
            result["texts"][name] = sum(losses) / len(blocks)
    model.train(was_training)
    return result
