# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Continues a prompt, streaming the text as it is generated, and prints which experts were used most.

    python examples/run_generation.py --model_name_or_path examples/checkpoints/peer-nano --prompt "def main(" --do_sample
"""

from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.model_arguments import loads_checkpoint
from modeling_peer import keep_tables_on_disk, measure_usage
from modeling_peer.analysis.expert_sets import find_expert_sets, find_fact_grafts


@dataclass
class GenerationArguments:
    """
    Which model continues which prompt, and how. Flags that are not given keep the generation options
    of the checkpoint.
    """

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder, or the id of a model of the Hub."})
    prompt: str = field(default="", metadata={"help": "Text to continue."})
    max_new_tokens: int = field(default=100, metadata={"help": "Maximum number of tokens to generate."})
    do_sample: bool = field(default=False, metadata={"help": "Sample tokens instead of choosing the most likely one."})
    temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature; below 1, likely tokens become more likely."}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Sample from the most likely tokens that together have this probability."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of --do_sample."})
    num_shown_experts: int = field(default=5, metadata={"help": "Number of experts to list per layer."})
    tables_on_disk: bool = field(
        default=False,
        metadata={"help": "Read the rows of experts from the checkpoint, for models larger than memory."},
    )

    def generation_options(self) -> dict[str, float | int | bool]:
        """The flags that were given, as arguments of `generate`."""
        names = ("do_sample", "temperature", "top_p")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}
        return {"max_new_tokens": self.max_new_tokens, **chosen}


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: float | int | bool
) -> torch.Tensor:
    """
    Prints the prompt and its continuation.

    Args:
        model (`PreTrainedModel`): Model in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model.
        prompt (`str`): Text to continue. An empty one stands for the beginning of a text.
        options: Arguments of `generate`.

    Returns:
        `torch.Tensor` of shape `(1, num_tokens)`: the tokens of prompt and continuation.
    """
    inputs = tokenizer(prompt or tokenizer.bos_token or tokenizer.eos_token, return_tensors="pt").to(model.device)
    # No beam search: a beam can change until the end.
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    return model.generate(**inputs, streamer=streamer, num_beams=1, **options)


@torch.no_grad()
def describe_experts(model: PreTrainedModel, tokens: torch.Tensor, num_shown: int = 5) -> str:
    """
    Describes, in one line per set of experts, how many experts a text used, and which ones most.

    Args:
        model (`PreTrainedModel`): Model in evaluation mode.
        tokens (`torch.Tensor` of shape `(1, num_tokens)`): Tokens of the text.
        num_shown (`int`): Number of experts to list, each with its share of the router weight.
    """
    usage = _usage_of_experts(model, tokens)
    lines = [f"{label}: facts; `explain_tokens` names those that tell a token" for label in find_fact_grafts(model)]
    if not usage and not lines:
        return "No layer of this model has PEER or PKM experts."
    for (_, label), meter in sorted(usage.items()):
        shares = meter.scores / meter.scores.sum()
        most = shares.topk(min(num_shown, len(shares)))
        named = ", ".join(
            f"{expert} ({share:.1%})" for share, expert in zip(*map(torch.Tensor.tolist, most), strict=True)
        )
        used = int((shares > 0).sum())
        lines.append(f"{label}: {used:,} of {len(shares):,} experts used over {tokens.shape[1]} tokens, most: {named}")
    return "\n".join(lines)


def _usage_of_experts(model, tokens):
    """Usage of the experts of PEER and PKM layers and of grafts, by their layers and their name in logs."""
    try:
        sets = find_expert_sets(model)
    except ValueError:  # there are none
        return {}
    meters = measure_usage(model, input_ids=tokens)
    return {(each.layers, each.label): meters[name] for name, each in sets.items()}


@ends_on_usage_error()
def main():
    (args,) = parse_arguments((GenerationArguments,), __doc__)
    set_seed(args.seed)
    with loads_checkpoint(args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        places = None if args.tables_on_disk else "auto"
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, device_map=places).eval()
    try:
        meter = keep_tables_on_disk(model) if args.tables_on_disk else None
    except (ValueError, OSError) as error:
        raise UsageError(f"--tables_on_disk: {error}") from error
    tokens = generate(model, tokenizer, args.prompt, **args.generation_options())
    if meter is not None:
        read = f"{meter.num_bytes / 1e6:,.0f} MB of rows read in {meter.seconds:.1f} s"
        print(f"\n{read}, {meter.hit_rate:.0%} of them from the page cache.")
    print("\n" + describe_experts(model, tokens, args.num_shown_experts))


if __name__ == "__main__":
    main()
