# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The bytes that a memory group exchanges, as docs/training-on-many-gpus.md has them."""


def memory_group_bytes(
    hidden_size: int, num_active: int, group_size: int, element_bytes: int, num_up_projections: int = 1
) -> dict[str, int]:
    """
    Bytes that a process receives for each of its own tokens, in a forward and backward of a layer, by what is
    exchanged. Its own part is not counted; gated experts have two up-projections, PKM none.
    """
    others = group_size - 1
    columns = others * hidden_size // group_size * element_bytes
    partial_sums, neurons = (others * num_active * size for size in (max(element_bytes, 4), element_bytes))
    return {
        "indices": others * num_active * 4,
        "hidden states": min(num_up_projections, 1) * columns,
        "dot products": num_up_projections * partial_sums,
        "weighted activations": neurons,
        "outputs": columns,
        "output gradients": columns,
        "weight gradients": partial_sums,
        "neuron gradients": num_up_projections * neurons,
        "hidden state gradients": min(num_up_projections, 1) * columns,
    }
