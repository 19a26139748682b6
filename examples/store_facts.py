# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stores the same facts in a PEER model, in a dense one of as many FLOPs per token, and in a dense one that is trained for
as many seconds: two minutes on two cores.

    ./run facts

A fact is a key of three random tokens and a value of eight. The script prints how many values each model recalls
without an error, and what each answers to one key. examples/studies/capacity compares more models with more facts.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils import logging

from common.command_line import parse_arguments
from studies.capacity.facts import KEY_TOKENS, VALUE_TOKENS, make_facts, measure
from studies.capacity.plan import Load, Run
from studies.capacity.training import store
from studies.capacity.variants import costs, make_model


PEER, DENSE, AS_LONG = "peer-16384", "dense", "dense, as long"
# Rates after trials with these numbers of facts: of all parameters, of u_i or of feed-forwards, and of v_i to u_i.
RATES: dict[str, dict[str, float]] = {
    PEER: {"learning_rate": 2e-3, "up_multiplier": 4.0, "multiplier": 48.0},
    DENSE: {"learning_rate": 5.6e-3, "up_multiplier": 2.0},
}


@dataclass
class StoreFactsArguments:
    """How much to store."""

    num_facts: int = field(default=6144, metadata={"help": "Number of facts, more than dense can hold."})
    exposures: int = field(default=10, metadata={"help": "How often each fact is seen."})
    seed: int = field(default=0, metadata={"help": "Draws facts, weights and the order of training."})


@dataclass
class Stored:
    """
    What a model stored: bits, the share of facts recalled, its value for the key of the first fact, and how long and
    how often it has seen the facts.
    """

    bits: float
    recalled: float
    value: list[int]
    seconds: float
    exposures: int


def store_and_ask(name: str, args: StoreFactsArguments, exposures: int) -> Stored:
    """Train a new model on the facts, and ask it for them."""
    print(f"\nTraining {name} on {args.num_facts:,} facts, {exposures} times each ...", flush=True)
    run = Run("facts", name, Load(args.num_facts, 8, exposures), seed=args.seed, warmup=0.4, **RATES[name])
    facts = make_facts(run.load.number, run.load.token_bits, run.seed)[0]
    model = make_model(name, run.seed)
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        store(model, facts.examples, run, Path(folder), run.load.exposures, progress=True)
        seconds = time.perf_counter() - start
    measured = measure(model, facts)
    answer = model.generate(facts.tokens[:1, :KEY_TOKENS], max_new_tokens=VALUE_TOKENS, do_sample=False)
    return Stored(measured["bits"], measured["recalled"], answer[0, KEY_TOKENS:].tolist(), seconds, exposures)


def table(results: dict[str, Stored]) -> str:
    """A table of what each model costs and has stored."""
    rows = {
        "": list(results),
        "FLOPs per token": [f"{costs(name.partition(',')[0]).total.flops:,}" for name in results],
        "parameters": [f"{costs(name.partition(',')[0]).total.parameters:,}" for name in results],
        "times seen": [f"{each.exposures}" for each in results.values()],
        "seconds": [f"{each.seconds:.0f}" for each in results.values()],
        "kbit stored": [f"{each.bits / 1e3:.0f}" for each in results.values()],
        "facts recalled": [f"{each.recalled:.1%}" for each in results.values()],
    }
    return "\n".join(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in rows.items())


def main():
    (args,) = parse_arguments((StoreFactsArguments,), __doc__)
    facts = make_facts(args.num_facts, 8, args.seed)[0]
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # at this size a second one helps little, and waits for busy cores
    results = {name: store_and_ask(name, args, args.exposures) for name in RATES}
    as_many = results[PEER].seconds / results[DENSE].seconds
    results[AS_LONG] = store_and_ask(DENSE, args, max(1, round(as_many * args.exposures)))
    key, value = facts.tokens[0].split([KEY_TOKENS, VALUE_TOKENS])
    print(
        f"\n{table(results)}\n\nThere were {facts.bits / 1e3:.0f} kbit to store. The first fact, and what each says:\n"
    )
    for name, tokens in {"the fact": value.tolist(), **{name: each.value for name, each in results.items()}}.items():
        print(f"{name:<16}{' '.join(map(str, key.tolist()))} ->", *tokens)
    print("\nWhat to do next:\n  ./run study capacity --help   more models and more facts, for hours")


if __name__ == "__main__":
    main()
