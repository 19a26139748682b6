# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Converts a layer of PEER-pytorch (PyPI `peer-pytorch` 0.2.2) into a layer of a checkpoint of this package.

    python examples/convert_peer_pytorch.py --peer_pytorch_checkpoint layer.pt --model_name_or_path CHECKPOINT \
        --layer 5 --output_dir runs/converted

`layer.pt` is the `state_dict()` of the layer, or of a larger model with `--prefix "blocks.5.ff."`. The weights do not
determine the flags `--num_experts_per_head`, `--product_key_topk`, `--non_competing_scores` and `--activation`, which
are the arguments that the layer was made with. Dropout, which only matters in training, is not converted. One run
converts one layer and keeps layers that were converted before.

| PEER-pytorch | here |
|---|---|
| `weight_down_embed`, u_i | `expert_pool.up_proj` |
| `weight_up_embed`, v_i | `expert_pool.down_proj` |
| expert `row * num_keys + column` | expert `expert_index(row, column)` |
| `keys` `[heads, num_keys, 2, dim_key]` | `router.sub_keys` `[heads, 2, √N, query_size / 2]`: `sub_keys_per_head` |
| `to_queries`, outputs ordered (half, head, feature) | `router.query_proj`, outputs ordered (head, half, feature) |
| `dim_key`, of one half | `query_size = 2 * dim_key`, of both halves; `query_norm = None` |
| `norm.gamma + 1`, with `pre_rmsnorm` | `post_attention_layernorm` of the decoder layer |
| `non_competing_scores`: one expert per head, ReLU | `num_experts_per_head = 1`, `scoring_func = "relu"` |
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.model_arguments import check_output_dir, checks_fields, loads_checkpoint
from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.configuration_peer import grid_size
from modeling_peer.experts import expert_index


TENSORS = ("weight_down_embed.weight", "weight_up_embed.weight", "to_queries.0.weight", "keys")
PRE_NORM = "norm.gamma"


@dataclass
class ConversionArguments:
    """The layer to convert, and the checkpoint and layer that receive it."""

    peer_pytorch_checkpoint: str = field(metadata={"help": "State dict, a .pt or .safetensors file."})
    model_name_or_path: str = field(metadata={"help": "Checkpoint to replace a layer of; it is not changed."})
    layer: int = field(metadata={"help": "Index of that layer, from 0."})
    output_dir: str = field(metadata={"help": "Folder to save the new checkpoint in."})
    prefix: str = field(default="", metadata={"help": 'Prefix of the names of its tensors, such as "blocks.5.ff.".'})
    num_experts_per_head: int = field(default=16, metadata={"help": "Argument of the layer with this name."})
    product_key_topk: int | None = field(
        default=None, metadata={"help": "Argument of the layer with this name. Defaults to --num_experts_per_head."}
    )
    non_competing_scores: bool = field(default=True, metadata={"help": "Argument of the layer with this name."})
    activation: str = field(default="gelu", metadata={"help": "Activation of the layer, by its name in Transformers."})


def layer_fields(
    state_dict: dict[str, torch.Tensor],
    num_experts_per_head: int = 16,
    product_key_topk: int | None = None,
    non_competing_scores: bool = True,
    activation: str = "gelu",
) -> dict[str, Any]:
    """
    Returns the fields of `PeerConfig` with which a `PeerFeedForward` computes the same function as a PEER-pytorch
    layer.

    Args:
        state_dict (`dict[str, torch.Tensor]`): State dict of a `PEER_pytorch.PEER`.
        num_experts_per_head, product_key_topk, non_competing_scores, activation: Arguments that the layer was made
        with.

    Raises:
        `UsageError`: if there are no such fields, or the state dict is not that of such a layer.
    """
    missing = [name for name in TENSORS if name not in state_dict]
    unknown = sorted(set(state_dict) - {*TENSORS, PRE_NORM})
    if missing or unknown:
        raise UsageError(
            f"These are not the tensors of a PEER-pytorch `PEER` layer: {missing} missing, {unknown} unknown. Give "
            "the prefix of the tensors of the layer by --prefix; `PEERLora` and `PKAttention` are other layers."
        )
    num_heads, num_keys, _, dim_key = state_dict["keys"].shape
    num_rows, hidden_size = state_dict["weight_down_embed.weight"].shape
    if num_rows != num_keys**2:
        raise UsageError(
            f"`separate_embed_per_head=True` cannot be converted: the {num_heads} heads have {num_rows} experts, "
            f"{num_keys**2} each, but all heads of a `PeerFeedForward` retrieve from one pool."
        )
    if product_key_topk is not None and product_key_topk < num_experts_per_head and not non_competing_scores:
        raise UsageError(
            f"`product_key_topk={product_key_topk}` cannot be converted: fewer candidates than the "
            f"{num_experts_per_head} experts of a head miss some of the best ones, but retrieval in this package is "
            "exact."
        )
    return {
        "hidden_size": hidden_size,
        "num_experts": num_keys**2,
        "num_retrieval_heads": num_heads,
        "num_experts_per_head": 1 if non_competing_scores else num_experts_per_head,
        "query_size": 2 * dim_key,
        "query_norm": None,
        "scoring_func": "relu" if non_competing_scores else "softmax",
        "sub_keys_per_head": True,
        "expert_act": activation,
        "gated_experts": False,
        "share_experts_across_layers": False,
        "shared_expert_intermediate_size": None,
    }


def convert_layer(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Returns the state dict of a `PeerFeedForward` that computes the same function as a PEER-pytorch layer after its
    `pre_rmsnorm`.

    Args:
        state_dict (`dict[str, torch.Tensor]`): State dict of a `PEER_pytorch.PEER` that [`layer_fields`] accepts.
    """
    num_heads, _, _, dim_key = state_dict["keys"].shape
    queries = state_dict["to_queries.0.weight"]
    queries = queries.view(2, num_heads, dim_key, -1).transpose(0, 1).reshape(queries.shape)
    return {
        "router.query_proj.weight": queries,
        "router.sub_keys": state_dict["keys"].transpose(1, 2).contiguous(),
        "expert_pool.up_proj.weight": _renumber_experts(state_dict["weight_down_embed.weight"]),
        "expert_pool.down_proj.weight": _renumber_experts(state_dict["weight_up_embed.weight"]),
    }


def _renumber_experts(table):
    """Reorders the rows of a table from row-major order in the key grid to the order of expert indices."""
    size = grid_size(table.shape[0])
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    renumbered = torch.empty_like(table)
    renumbered[expert_index(row, column).flatten()] = table
    return renumbered


def place_layer(
    base_model: PeerForCausalLM, layer: int, state_dict: dict[str, torch.Tensor], fields: dict[str, Any]
) -> PeerForCausalLM:
    """
    Returns a copy of a model in which the PEER-pytorch layer replaces the feed-forward of one layer.

    Args:
        base_model (`PeerForCausalLM`): Model that all other weights come from. It is not changed.
        layer (`int`): Index of the layer.
        state_dict (`dict[str, torch.Tensor]`): State dict of a `PEER_pytorch.PEER`.
        fields (`dict[str, Any]`): Fields of the layer, from [`layer_fields`].

    Raises:
        `UsageError`: if the layer does not fit into the model.
    """
    config = base_model.config
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("The checkpoint is quantized: give the one that it was made from.")
    _check_fit(config, layer, fields)
    types = list(config.feed_forward_types)
    types[layer] = "peer"
    name = f"model.layers.{layer}"
    weights = {key: value for key, value in base_model.state_dict().items() if not key.startswith(f"{name}.mlp.")}
    weights |= {f"{name}.mlp.{key}": value for key, value in convert_layer(state_dict).items()}
    if PRE_NORM in state_dict:
        weights[f"{name}.post_attention_layernorm.weight"] = state_dict[PRE_NORM] + 1
    with checks_fields():
        model = PeerForCausalLM(PeerConfig.from_dict(config.to_dict() | fields | {"feed_forward_types": types}))
    model.load_state_dict(weights)
    model.generation_config = base_model.generation_config
    return model.to(base_model.dtype).eval()


def _check_fit(config, layer, fields):
    if not 0 <= layer < config.num_hidden_layers:
        raise UsageError(f"There is no layer {layer}: the checkpoint has layers 0 to {config.num_hidden_layers - 1}.")
    if config.hidden_size != fields["hidden_size"]:
        raise UsageError(
            f"`dim` of the layer must equal the `hidden_size` of the checkpoint, {config.hidden_size}, but got "
            f"`dim={fields['hidden_size']}`."
        )
    others = [i for i, name in enumerate(config.feed_forward_types) if name in ("peer", "pkm") and i != layer]
    differing = [
        f"{name} = {getattr(config, name)}, not {value}"
        for name, value in fields.items()
        if getattr(config, name) != value
    ]
    if others and differing:
        raise UsageError(
            f"All PEER layers of a model must have the same shape, but layers {others} of the checkpoint have "
            f"{'; '.join(differing)}."
        )


@ends_on_usage_error()
def main():
    (args,) = parse_arguments((ConversionArguments,), __doc__)
    check_output_dir(args.output_dir, args.model_name_or_path)
    with loads_checkpoint(args.model_name_or_path):
        base_model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    if not isinstance(base_model, PeerForCausalLM):
        raise UsageError(
            f"{args.model_name_or_path} must contain a PeerForCausalLM, but contains a {type(base_model).__name__}."
        )
    state_dict = _load_state_dict(args.peer_pytorch_checkpoint, args.prefix)
    fields = layer_fields(
        state_dict,
        num_experts_per_head=args.num_experts_per_head,
        product_key_topk=args.product_key_topk,
        non_competing_scores=args.non_competing_scores,
        activation=args.activation,
    )
    model = place_layer(base_model, args.layer, state_dict, fields)
    tokenizer = _tokenizer_of(args.model_name_or_path)
    model.save_pretrained(args.output_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.output_dir)
    print(f"Saved {args.output_dir}, whose layer {args.layer} is converted from {args.peer_pytorch_checkpoint}.")


def _load_state_dict(file, prefix):
    if not Path(file).is_file():
        raise UsageError(f"There is no file {file}: name the state dict of the layer by --peer_pytorch_checkpoint.")
    tensors = load_file(file) if Path(file).suffix == ".safetensors" else torch.load(file, weights_only=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _tokenizer_of(name_or_path):
    """The tokenizer of a checkpoint. `None` if it has none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    main()
