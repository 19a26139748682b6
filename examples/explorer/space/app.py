# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A Space of the Hugging Face Hub in which visitors explore the experts of a model.

Set the variable `MODEL` of the Space to the name of the model on the Hub, or copy `examples/checkpoints/peer-nano` into the
folder of the Space. `CORPUS`, if it is set, is a text file of the Space, of which each paragraph is a context in which
experts may be used; `TEXT` is the text that is shown when the Space opens.
"""

import os
from pathlib import Path

from explorer import ExpertContexts, make_app
from transformers import AutoModelForCausalLM, AutoTokenizer


# Shown when the Space opens, if its variable TEXT is not set.
TEXT = """\
def mean(numbers):
    if not numbers:
        raise ValueError("mean() requires at least one number")
    total = 0
    for number in numbers:
        total += number
    return total / len(numbers)
"""


def main() -> None:
    name = os.environ.get("MODEL") or str(Path(__file__).with_name("peer-nano"))
    if not os.environ.get("MODEL") and not Path(name).is_dir():
        raise SystemExit("There is no model: set the variable MODEL of the Space, or upload a model as `peer-nano`.")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    contexts = None
    if corpus := os.environ.get("CORPUS"):
        paragraphs = Path(corpus).read_text(encoding="utf-8").split("\n\n")
        contexts = ExpertContexts.measure(model, tokenizer, paragraphs)
    text = os.environ.get("TEXT", TEXT)
    make_app(model, tokenizer, contexts=contexts, title=f"Experts of {Path(name).name}", text=text).launch()


if __name__ == "__main__":
    main()
