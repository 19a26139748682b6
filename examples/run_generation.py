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
r"""
Continues a prompt, printing the text as it comes, and says which experts it used most.

    python examples/run_generation.py --model_name_or_path runs/quickstart/peer-tiny --prompt "def main(" --do_sample
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

from common.training import parse_arguments
from modeling_peer import ExpertUsageMeter


@dataclass
class GenerationArguments:
    """Which model continues what, and how it chooses tokens: flags that are not given are the checkpoint's own."""

    model_name_or_path: str = field(metadata={"help": "A checkpoint: a folder, or a model of the Hub by its id."})
    prompt: str = field(default="", metadata={"help": "The text to continue."})
    max_new_tokens: int = field(default=100, metadata={"help": "The most tokens to add."})
    do_sample: bool = field(default=False, metadata={"help": "Draw tokens instead of taking the likeliest."})
    temperature: float | None = field(default=None, metadata={"help": "Below 1, likely tokens get likelier."})
    top_k: int | None = field(default=None, metadata={"help": "Draw from this many of the likeliest tokens."})
    top_p: float | None = field(
        default=None, metadata={"help": "Draw from the likeliest tokens that together have this probability."}
    )
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Above 1, tokens that are there already get less likely."}
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "Search with this many beams; the text comes when it is whole."}
    )
    seed: int = field(default=42, metadata={"help": "What --do_sample starts from."})
    num_shown_experts: int = field(default=5, metadata={"help": "How many experts of each layer to name."})

    def generation_options(self) -> dict[str, float | int | bool]:
        """What was asked for, as `generate` takes it."""
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}
        return {"max_new_tokens": self.max_new_tokens, **chosen}


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: float | int | bool
) -> torch.Tensor:
    """
    Prints the prompt and its continuation.

    Args:
        model (`PreTrainedModel`)
        tokenizer (`PreTrainedTokenizerBase`)
        prompt (`str`): The text to continue; an empty one stands for the beginning of a text.
        options: Of `generate`.

    Returns:
        `torch.Tensor` of shape `(1, num_tokens)`: the tokens of all of the text.
    """
    inputs = tokenizer(prompt or tokenizer.bos_token or tokenizer.eos_token, return_tensors="pt").to(model.device)
    # Beams are not final before the end.
    streams = options.get("num_beams", model.generation_config.num_beams) in (None, 1)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if streams else None
    tokens = model.generate(**inputs, streamer=streamer, **options)
    if not streams:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return tokens


@torch.no_grad()
def describe_experts(model: PreTrainedModel, tokens: torch.Tensor, num_shown: int = 5) -> str:
    """
    A line for each layer with a router: how many experts a text used, and which most.

    Args:
        model (`PreTrainedModel`)
        tokens (`torch.Tensor` of shape `(1, num_tokens)`): The text.
        num_shown (`int`): How many experts to name; beside each stands its share of the router weight.
    """
    config = model.config
    if getattr(config, "feed_forward_types", None) is None:
        return f"A model of type {config.model_type!r} has no PEER layers."
    layers = [layer for layer, name in enumerate(config.feed_forward_types) if name in ("peer", "pkm", "moe")]
    if not layers:
        return "No layer of this model has experts."
    outputs = model(tokens, output_router_indices=True, output_router_weights=True)
    lines = []
    for layer, indices, weights in zip(layers, outputs.router_indices, outputs.router_weights, strict=True):
        is_moe = config.feed_forward_types[layer] == "moe"
        meter = ExpertUsageMeter(config.moe_num_experts if is_moe else config.num_experts, device=model.device)
        # The router of a MoE returns tokens in one row, and has one head.
        shape = (*tokens.shape, -1, indices.shape[-1])
        meter.update(indices.view(shape), weights.view(shape))
        shares = meter.scores / meter.scores.sum()
        most = shares.topk(min(num_shown, len(shares)))
        named = ", ".join(
            f"{expert} ({share:.1%})" for share, expert in zip(*map(torch.Tensor.tolist, most), strict=True)
        )
        used = int((shares > 0).sum())
        lines.append(
            f"layer {layer}: {used:,} of {len(shares):,} experts used over {tokens.shape[1]} tokens, most: {named}"
        )
    return "\n".join(lines)


def main():
    (args,) = parse_arguments((GenerationArguments,), __doc__)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, device_map="auto").eval()
    tokens = generate(model, tokenizer, args.prompt, **args.generation_options())
    print("\n" + describe_experts(model, tokens, args.num_shown_experts))


if __name__ == "__main__":
    main()
