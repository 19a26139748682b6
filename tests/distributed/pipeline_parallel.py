# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Splits tiny models over two processes by pipeline parallelism of Transformers, and runs them whole.

    torchrun --nproc_per_node 2 pipeline_parallel.py OUTPUT
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cases import MODELS, hand_over, outputs, tiny_model
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM


RANK = int(os.environ["RANK"])


def run(model: PeerForCausalLM) -> dict[str, torch.Tensor]:
    # A stage without the first layer takes its cache for empty and forgets the padding: so does Llama in Transformers.
    return outputs(model, padded_cache=False)


def main() -> None:
    output = Path(sys.argv[1])
    for name, config in MODELS.items():
        model = tiny_model(config)
        model.save_pretrained(output / f"start-{RANK}" / name)
        hand_over(output, f"{name}-whole-{RANK}", run(model))
    for name in MODELS:
        distributed = DistributedConfig(pp_size=2)
        model, loading = PeerForCausalLM.from_pretrained(
            output / f"start-{RANK}" / name, distributed_config=distributed, output_loading_info=True
        )
        facts = {
            "parameters": [name for name, _ in model.named_parameters()],
            "unloaded": sorted(loading["missing_keys"] | loading["unexpected_keys"]),
        }
        hand_over(output, f"{name}-{RANK}", run(model), facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
