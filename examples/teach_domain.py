# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Teaches a trained model the text of a domain, and keeps what it has learned: adds experts and trains only these.

    python examples/teach_domain.py --model_name_or_path runs/clm --train_file notes --kept_file corpus \
        --output_dir runs/taught

A PEER model gets further experts in each of its PEER layers. Any other causal language model gets a graft, a PEER
layer beside the feed-forward of its middle layer, which is saved as an adapter of PEFT.

A gate decides by the hidden states of a token whether it uses the added experts. It is fitted to open for the text of
the domain and to stay shut for a sample of --kept_file, text that the model should continue to predict as before.
Without this flag, the model writes such a sample itself.

The script prints the held-out perplexity of both texts before and after, and without the added experts, which is
the original model. It saves these figures as `teaching.json` in --output_dir. An interrupted run resumes from
the last checkpoint there. The defaults are the best of the study of streams, `examples/studies/stream/`.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel, get_peft_model
from run_clm import choose_block_size, load_text
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import SchedulerType

from common.cards import TEACHING_FLAGS_FILE
from common.command_line import UsageError, command_to_share, ends_on_usage_error, parse_arguments
from common.evaluation import held_out_loss
from common.machine import machine
from common.model_arguments import ModelArguments, check_output_dir, load_config, load_model
from common.text_data import DataTrainingArguments, load_datasets, take_samples
from common.text_files import errors_name_the_file
from common.training import (
    ExampleTrainingArguments,
    OptimizerArguments,
    last_checkpoint,
    make_optimizers,
    save_card,
    setup_logging,
    train,
)
from modeling_peer import (
    PeerConfig,
    PeerGraftConfig,
    add_experts,
    fit_gates,
    generate_text,
    last_complete_checkpoint,
    masked_experts,
)
from modeling_peer.graft.card import write_adapter_card


DOMAIN, KEPT = "domain", "kept text"

# Flags of the data that neither the text to train on nor the gates depend on.
UNTRAINED_FLAGS = ("max_eval_samples", "preprocessing_num_workers", "overwrite_cache")

# Sequences that the model writes to be evaluated on, if there is no text to keep.
NUM_WRITTEN_FOR_EVALUATION = 32

# What --help shows.
MAIN_FLAGS = (
    *("model_name_or_path", "train_file", "validation_file", "dataset_name", "text_column_name", "block_size"),
    *("kept_file", "kept_standard_library", "num_added_experts", "num_gate_sequences", "reference_weight"),
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate"),
    *("eval_strategy", "eval_steps", "save_steps", "bf16", "push_to_hub", "hub_model_id"),
)


@dataclass
class TeachingArguments:
    """How many experts are added, and which texts the model should continue to predict as before."""

    num_added_experts: int = field(
        default=64**2,
        metadata={
            "help": "Experts to add to each PEER layer, or to the middle layer of another model, a square number."
        },
    )
    kept_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts that the model is to go on predicting as it did: files, folders or patterns, as of "
            "--train_file. Each name is one text, and all of them count the same. Without any, the model writes it."
        },
    )
    kept_standard_library: bool = field(
        default=False,
        metadata={
            "help": "A text to keep is the source code of the Python standard library, on which the example scripts "
            "train without data flags."
        },
    )
    num_gate_sequences: int = field(
        default=128, metadata={"help": "Sequences of either text that the gates are fitted to."}
    )
    reference_weight: float = field(
        default=16.0, metadata={"help": "How much more it counts that gates stay shut for the text to keep."}
    )

    def __post_init__(self):
        if isinstance(self.kept_file, str):  # a file of arguments in JSON may name a single file by a string
            self.kept_file = [self.kept_file]
        if self.num_gate_sequences < 2:
            raise UsageError(
                "--num_gate_sequences must be at least 2, one to fit gates to and one to hold out, got "
                f"{self.num_gate_sequences}."
            )
        if len(self.kept_texts) > self.num_gate_sequences:
            raise UsageError(
                f"--num_gate_sequences {self.num_gate_sequences} gives none to some of the {len(self.kept_texts)} texts "
                "to keep: name files that are one text by their folder, or by a pattern in quotes."
            )

    @property
    def kept_texts(self) -> list[str | None]:
        """The names of the texts to keep, `None` for the standard library. Without any the model writes one."""
        return [*(self.kept_file or []), *([None] if self.kept_standard_library else [])]


@dataclass
class DomainArguments(DataTrainingArguments):
    """The text of the domain."""

    block_size: int = field(default=256, metadata={"help": "Tokens per sequence."})
    max_eval_samples: int = field(
        default=64,
        metadata={"help": "Number of held-out sequences of either text that is given to evaluate on, evenly spaced."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None and not self.train_file:
            raise UsageError("There is no text to teach: name it by --train_file or --dataset_name.")
        if self.streaming:
            raise UsageError("--streaming is for longer texts than this script takes, which holds them in memory.")
        if self.train_file and not self.validation_file and not self.validation_split_percentage:
            raise UsageError(
                "There is no text of the domain to evaluate on: name it by --validation_file, or leave out "
                "--validation_split_percentage 0."
            )


@dataclass
class DomainTrainingArguments(ExampleTrainingArguments):
    """Training arguments with the settings of the study of streams as defaults."""

    do_train: bool = field(default=True, metadata={"help": "Always done."})
    do_eval: bool = field(default=True, metadata={"help": "Always done."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate after the warm-up."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Name of the learning rate schedule."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences of a step, per device."})
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between logs; below 1, a share of all steps."})

    def __post_init__(self):
        self.do_train = self.do_eval = True
        super().__post_init__()


@dataclass
class Figures:
    """
    Figures of a teaching.

    Args:
        before, after, masked (`dict[str, float]`):
            Held-out perplexity of either text before the teaching, after it, and then without the added experts.
        openness (`dict[str, float]`): Mean of the gates of all layers on either text, after they were fitted.
        layers (`list[int | str]`): Where experts were added: indices of PEER layers, or the label of the graft.
    """

    before: dict[str, float]
    openness: dict[str, float]
    after: dict[str, float] = field(default_factory=dict)
    masked: dict[str, float] = field(default_factory=dict)
    layers: list[int | str] = field(default_factory=list)

    @property
    def is_restored(self) -> bool:
        """Whether the model without the added experts predicts as it did, to the bit."""
        return self.masked == self.before

    def __str__(self) -> str:
        rows = {
            "held-out perplexity": [DOMAIN, KEPT],
            "before": [f"{self.before[name]:.2f}" for name in (DOMAIN, KEPT)],
            "after": [f"{self.after[name]:.2f}" for name in (DOMAIN, KEPT)],
            "after, without the experts": [f"{self.masked[name]:.2f}" for name in (DOMAIN, KEPT)],
            "mean of the gates": [f"{self.openness[name]:.1%}" for name in (DOMAIN, KEPT)],
        }
        return "\n".join(f"{name:<28}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows.items())


def check_can_be_taught(config: PreTrainedConfig, num_added_experts: int) -> None:
    """Raises `UsageError` if experts cannot be added to a model with this configuration."""
    is_peer = isinstance(config, PeerConfig)
    if is_peer and "peer" not in config.feed_forward_types:
        raise UsageError(
            f"The model has no PEER layer to add experts to, only {sorted(set(config.feed_forward_types))}: choose "
            "another checkpoint, --model_name_or_path."
        )
    if is_peer and getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            "The experts of the model are quantized, and none are added to such: teach the checkpoint that it was "
            "quantized from, and quantize the result by examples/quantize.py."
        )
    smallest = (config if is_peer else PeerGraftConfig).num_experts_per_head ** 2
    if num_added_experts < smallest or math.isqrt(num_added_experts) ** 2 != num_added_experts:
        raise UsageError(
            f"--num_added_experts must be a square number of at least {smallest}, the square of "
            f"`num_experts_per_head`, got {num_added_experts}."
        )


def load_texts(
    args: TeachingArguments,
    model_args: ModelArguments,
    data_args: DomainArguments,
    training_args: DomainTrainingArguments,
    config: PreTrainedConfig,
) -> tuple[PreTrainedTokenizerBase, dict[str, dict[str, Dataset]]]:
    """Load the tokenizer and the sequences of both texts: `"train"`, of the kept text a sample, and `"validation"`."""
    tokenizer, blocks = load_text(model_args, data_args, training_args, config)
    texts = {DOMAIN: blocks}
    if args.kept_texts:
        kept = [
            load_kept_text(kept_arguments(name, args, data_args), model_args, training_args, config)
            for name in args.kept_texts
        ]
        texts[KEPT] = {name: concatenate_datasets([blocks[name] for blocks in kept]) for name in kept[0]}
    for name, blocks in texts.items():
        if len(blocks["train"]) < 2:
            raise UsageError(
                f"The {name} fills one sequence of {choose_block_size(data_args, config)} tokens, and the gates need two, "
                "one to be fitted to and one to be held out: choose a smaller --block_size, or more text."
            )
    return tokenizer, texts


def kept_arguments(name: str | None, args: TeachingArguments, data_args: DomainArguments) -> DataTrainingArguments:
    """Arguments that read a text to keep: as for the domain, with equally many sequences of each text to keep."""
    shared = {each.name: getattr(data_args, each.name) for each in fields(DataTrainingArguments)}
    own: dict[str, Any] = dict.fromkeys(("dataset_name", "dataset_config_name", "validation_file"))
    own["train_file"] = None if name is None else [name]
    own["max_train_samples"] = args.num_gate_sequences // len(args.kept_texts)
    own["max_eval_samples"] = max(1, data_args.max_eval_samples // len(args.kept_texts))
    if name is None:
        own["text_column_name"] = None
    if name is None or not data_args.validation_split_percentage:
        # Hold out the default share of the standard library: models of these scripts were trained on the rest.
        own["validation_split_percentage"] = DataTrainingArguments.validation_split_percentage
    return DataTrainingArguments(**shared | own)


def load_kept_text(
    kept_args: DataTrainingArguments,
    model_args: ModelArguments,
    training_args: DomainTrainingArguments,
    config: PreTrainedConfig,
) -> dict[str, Dataset]:
    """Load the sequences of a text to keep. If it lacks the text column of the domain, the default column is read."""
    try:
        if kept_args.text_column_name is not None:
            whole = replace(kept_args, text_column_name=None, validation_split_percentage=0)
            with training_args.main_process_first(desc="loading the text to keep"):
                columns = load_datasets(whole)["train"].column_names
            if kept_args.text_column_name not in columns:
                kept_args = replace(kept_args, text_column_name=None)
        _, blocks = load_text(model_args, kept_args, training_args, config)
    except UsageError as error:
        raise UsageError(f"The text to keep, {kept_args.description}, cannot be used: {error}") from error
    return blocks


def written_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, number: int, length: int, progress_bar: bool
) -> dict[str, Dataset]:
    """Let the model write `number` sequences of `length` tokens for the gates, and some to evaluate on."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UsageError("The tokenizer has no token with which a text begins: name text to keep, --kept_file.")
    written = generate_text(model, number + NUM_WRITTEN_FOR_EVALUATION, length, progress_bar=progress_bar)
    sequences = [each["input_ids"].tolist() for each in written]
    blocks = Dataset.from_dict({"input_ids": sequences, "labels": sequences})
    return {"train": blocks.select(range(number)), "validation": blocks.select(range(number, len(blocks)))}


def perplexities(
    model: PreTrainedModel, texts: dict[str, dict[str, Dataset]], training_args: DomainTrainingArguments
) -> dict[str, float]:
    """The held-out perplexity of either text."""
    return {
        name: math.exp(
            held_out_loss(
                model,
                torch.tensor(blocks["validation"]["input_ids"][:]),
                training_args.per_device_eval_batch_size,
                desc=f"Perplexity, {name}",
                progress_bar=not training_args.disable_tqdm,
            )
        )
        for name, blocks in texts.items()
    }


def add(
    model: PreTrainedModel, num_experts: int
) -> tuple[PreTrainedModel | PeftModel, Callable[[], AbstractContextManager[None]]]:
    """
    Add experts to each layer of a PEER model, or a graft to another model. Returns the model, of which only these are
    trained, and what makes a context without them.
    """
    if isinstance(model.config, PeerConfig):
        return model, partial(without, model, add_experts(model, num_experts))
    with ends_on_usage_error(ValueError):
        graft = PeerGraftConfig(task_type="CAUSAL_LM", num_experts=num_experts, has_gate=True)
        adapted: PeftModel = get_peft_model(model, graft)
    return adapted, adapted.disable_adapter


def grow(
    model: PreTrainedModel,
    texts: dict[str, dict[str, Dataset]],
    args: TeachingArguments,
    training_args: DomainTrainingArguments,
) -> tuple[PreTrainedModel | PeftModel, Callable[[], AbstractContextManager[None]], Figures]:
    """Add experts and fit their gates. Returns what [`add`] does, and the figures so far."""
    samples = {name: take_samples(blocks["train"], args.num_gate_sequences) for name, blocks in texts.items()}
    before = perplexities(model, texts, training_args)
    grown, original = add(model, args.num_added_experts)
    fits = fit_gates(
        grown,
        samples[DOMAIN],
        samples[KEPT],
        reference_weight=args.reference_weight,
        batch_size=training_args.per_device_eval_batch_size,
        progress_bar=not training_args.disable_tqdm,
    )
    openness = {
        DOMAIN: sum(fit.open_for_new for fit in fits.values()) / len(fits),
        KEPT: sum(fit.open_for_reference for fit in fits.values()) / len(fits),
    }
    return grown, original, Figures(before, openness, layers=[*fits])


def make_trainer(
    model: PreTrainedModel | PeftModel,
    training_args: DomainTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, dict[str, Dataset]],
) -> Trainer:
    """Makes the `Trainer` of a grown model, of which only the added experts and their routers are trained."""
    return Trainer(
        model=model,
        args=training_args,
        train_dataset=texts[DOMAIN]["train"],
        eval_dataset={name.replace(" ", "_"): blocks["validation"] for name, blocks in texts.items()},
        processing_class=tokenizer,
        data_collator=default_data_collator,
        optimizers=make_optimizers(OptimizerArguments(), training_args, model, is_new=False),
    )


@contextmanager
def without(model: PreTrainedModel, experts: dict[int, range]) -> Iterator[None]:
    """Masks the experts of one addition. Those of earlier ones, if there are any, stay in use."""
    layers_of: dict[range, list[int]] = {}
    for layer, added in experts.items():
        layers_of.setdefault(added, []).append(layer)
    with ExitStack() as stack:
        for added, layers in layers_of.items():
            stack.enter_context(masked_experts(model, added, layers=layers))
        yield


def save_figures(trainer: Trainer, figures: Figures, **run: Any) -> None:
    """Save the figures for the card of the model and, with the details of the run, as `teaching.json`."""
    found = {"perplexity_before": figures.before, "perplexity": figures.after, "perplexity_masked": figures.masked}
    trainer.save_metrics("eval", {f"{key}/{name}": value for key, own in found.items() for name, value in own.items()})
    if trainer.is_world_process_zero():
        text = json.dumps({**asdict(figures), **run, "machine": machine()}, indent=2)
        Path(trainer.args.output_dir, "teaching.json").write_text(text + "\n", encoding="utf-8")


CARD = """

## The text of a domain

It adds {number:,} experts, which were trained on {data}. Within `with model.disable_adapter():` the model is the base
model.

```
{figures}
```
"""


def write_graft_card(trainer: Trainer, figures: Figures, number: int, data: str, **_: Any) -> None:
    """Write the figures into the card of a graft, in place of those of an earlier run."""
    if trainer.is_world_process_zero():
        file = Path(trainer.args.output_dir, "README.md")
        write_adapter_card(file.parent, trainer.model.name_or_path, "CAUSAL_LM")
        text = CARD.format(number=number, data=data, figures=figures)
        before = file.read_text(encoding="utf-8").partition(text[: text.index("It adds")])[0]
        file.write_text(before.rstrip() + text, encoding="utf-8")


def describe(figures: Figures, num_experts: int, is_adapter: bool, folder: str) -> str:
    """A report of a teaching, and what to do next."""
    restored = "what they were, to the bit" if figures.is_restored else "not quite what they were"
    push = f"./run python examples/push_to_hub.py --model_name_or_path {folder} --repo_id USER/taught"
    if is_adapter:
        push = f'hf upload USER/taught {folder} --exclude "checkpoint-*" --exclude "_*"'
    return f"""
{figures}

{num_experts:,} experts were added at each of: {", ".join(map(str, figures.layers))}. Without them, perplexities are {restored}.

In {folder}: the {"adapter" if is_adapter else "model"} with its tokenizer, and all figures in teaching.json.
What to do next:
  ./run python examples/run_generation.py --model_name_or_path {folder} --prompt "The " --do_sample
  {push}
  docs/teach-a-model.md   what to do if a text is predicted worse than it should be, or for a further domain"""


def teaching_flags(
    args: TeachingArguments,
    model_args: ModelArguments,
    data_args: DomainArguments,
    training_args: DomainTrainingArguments,
) -> dict[str, Any]:
    """The flags that the added experts, their gates and the text that these learn depend on."""
    data = {name: value for name, value in asdict(data_args).items() if name not in UNTRAINED_FLAGS}
    model = {"model_name_or_path": model_args.model_name_or_path, "model_revision": model_args.model_revision}
    return asdict(args) | data | model | {"seed": training_args.seed}


def check_checkpoint(flags: dict[str, Any], training_args: DomainTrainingArguments) -> None:
    """
    Raise `UsageError` if the output folder has a checkpoint of another script, or of a teaching with other flags: its
    experts and gates would be taken for those of this one.
    """
    if last_complete_checkpoint(training_args.output_dir) is None:
        return
    file = Path(training_args.output_dir, TEACHING_FLAGS_FILE)
    if not file.exists():
        raise UsageError(
            f"{training_args.output_dir} has checkpoints, but no {TEACHING_FLAGS_FILE}, which this script saves before "
            "its first: they are of another script, so choose another --output_dir."
        )
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := [f"--{name} was {before.get(name)}" for name in flags if flags[name] != before.get(name)]:
        raise UsageError(
            f"{training_args.output_dir} has a checkpoint of another teaching, of which {', '.join(changed)}: choose "
            "another --output_dir, or remove this one."
        )


def save_flags(flags: dict[str, Any], training_args: DomainTrainingArguments) -> None:
    """Save the flags that [`check_checkpoint`] compares, unless there is a checkpoint already: its flags are saved."""
    if training_args.process_index == 0 and last_complete_checkpoint(training_args.output_dir) is None:
        folder = Path(training_args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEACHING_FLAGS_FILE).write_text(json.dumps(flags, indent=2) + "\n", encoding="utf-8")


def prepare(
    args: TeachingArguments,
    model_args: ModelArguments,
    data_args: DomainArguments,
    training_args: DomainTrainingArguments,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, dict[str, Dataset]]]:
    """Load the model, its tokenizer and both texts. Raises `UsageError` if the model or a text cannot be used."""
    if model_args.is_new:
        raise UsageError("There is no model to teach: name a checkpoint by --model_name_or_path.")
    config = load_config(model_args)
    check_can_be_taught(config, args.num_added_experts)
    tokenizer, texts = load_texts(args, model_args, data_args, training_args, config)
    set_seed(training_args.seed)
    model = load_model(AutoModelForCausalLM, model_args, config, tokenizer).to(training_args.device)
    if KEPT not in texts:
        length = choose_block_size(data_args, config)
        texts[KEPT] = written_texts(model, tokenizer, args.num_gate_sequences, length, not training_args.disable_tqdm)
    return model, tokenizer, texts


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, dict[str, Dataset]],
    args: TeachingArguments,
    training_args: DomainTrainingArguments,
    checkpoint: str | None,
    data: str,
) -> tuple[Trainer, Figures]:
    """Add experts to a model, train them or resume from a checkpoint, and measure the result."""
    model, original, figures = grow(model, texts, args, training_args)
    trainer = make_trainer(model, training_args, tokenizer, texts)
    train(trainer, checkpoint, data)
    # With bf16, Accelerate wraps the forward in autocast: unwrap it to compare the model with the original.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    figures.after = perplexities(model, texts, training_args)
    with original():
        figures.masked = perplexities(model, texts, training_args)
    return trainer, figures


def main():
    start = time.time()
    args, data_args, training_args, model_args = parse_arguments(
        (TeachingArguments, DomainArguments, DomainTrainingArguments, ModelArguments), __doc__, MAIN_FLAGS
    )
    setup_logging(training_args)
    files = [*data_args.files, *(args.kept_file or [])]
    flags = teaching_flags(args, model_args, data_args, training_args)
    with ends_on_usage_error(), errors_name_the_file(files, data_args.encoding):
        check_output_dir(training_args.output_dir, model_args.model_name_or_path)
        check_checkpoint(flags, training_args)
        checkpoint = last_checkpoint(training_args)
        model, tokenizer, texts = prepare(args, model_args, data_args, training_args)
    save_flags(flags, training_args)
    trainer, figures = teach(model, tokenizer, texts, args, training_args, checkpoint, data_args.description)
    command = command_to_share(sys.argv, training_args.hub_token)
    save_figures(trainer, figures, command=command, seconds=round(time.time() - start))
    is_adapter = isinstance(trainer.model, PeftModel)
    if is_adapter:
        shown = figures, args.num_added_experts, data_args.description
        trainer.create_model_card = partial(write_graft_card, trainer, *shown)
        trainer.create_model_card()
    save_card(trainer, dataset=data_args.dataset_name)
    print(describe(figures, args.num_added_experts, is_adapter, training_args.output_dir))


if __name__ == "__main__":
    main()
