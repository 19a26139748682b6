# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A Space of the Hugging Face Hub in which visitors explore the experts of a model.

Set the variable `MODEL` of the Space to the name of the model on the Hub, or copy `examples/checkpoints/peer-nano` into the
folder of the Space; `CORPUS`, if it is set, is a text file of the Space, of which each paragraph is a context in which
experts may be used.
"""

import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_peer.explorer import ExpertContexts, make_app


def main() -> None:
    name = os.environ.get("MODEL") or str(Path(__file__).with_name("peer-nano"))
    if not os.environ.get("MODEL") and not Path(name).is_dir():
        raise SystemExit("There is no model: set the variable MODEL of the Space, or upload a model as `peer-nano`.")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    contexts = None
    if corpus := os.environ.get("CORPUS"):
        paragraphs = Path(corpus).read_text(encoding="utf-8").split("\n\n")
        contexts = ExpertContexts.measure(model, tokenizer, paragraphs)
    make_app(model, tokenizer, contexts=contexts, title=f"Experts of {Path(name).name}").launch()


if __name__ == "__main__":
    main()
