# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Makes an HTML page for exploring the experts of a model: which ones each token of a text uses, and what they do.

    ./run python examples/make_explorer_page.py --model_name_or_path examples/checkpoints/peer-nano \\
        --text "$(tail -n 20 examples/quantize.py)" --corpus_file examples/quickstart.py --output_file experts.html
"""

from dataclasses import dataclass, field
from pathlib import Path

from explorer import ExpertContexts, save_explorer_page
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.command_line import ends_on_usage_error, parse_arguments
from common.model_arguments import loads_checkpoint


@dataclass
class Arguments:
    """Model and texts of the page, and where to save it."""

    model_name_or_path: str = field(metadata={"help": "Folder of a model, or its name on the Hub."})
    text: list[str] = field(metadata={"help": "One or several texts, between which the reader of the page chooses."})
    corpus_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Text files in which to look for the contexts that use each expert most, by paragraphs."},
    )
    output_file: str = field(default="experts.html", metadata={"help": "Where to save the page."})
    num_switched_off: int = field(
        default=8,
        metadata={
            "help": "How many experts of each layer it can switch off, those that the text uses most; each takes a "
            "forward pass."
        },
    )


@ends_on_usage_error(ValueError, OSError)
def main() -> None:
    (arguments,) = parse_arguments((Arguments,), __doc__)
    folder = Path(arguments.model_name_or_path)
    with loads_checkpoint(arguments.model_name_or_path):
        model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    contexts = None
    if arguments.corpus_file:
        files = [Path(file).read_text(encoding="utf-8") for file in arguments.corpus_file]
        contexts = ExpertContexts.measure(model, tokenizer, [part for file in files for part in file.split("\n\n")])
    save_explorer_page(
        model,
        tokenizer,
        arguments.text,
        arguments.output_file,
        contexts=contexts,
        title=f"Experts of {folder.resolve().name if folder.is_dir() else folder}",
        num_switched_off=arguments.num_switched_off,
    )
    print(f"The page is in {arguments.output_file}.")


if __name__ == "__main__":
    main()
