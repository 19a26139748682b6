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
"""
Runs tiny models under tensor parallelism in a process group whose other ranks do not exist, and counts what a rank
receives. The numbers computed are meaningless, the sizes of tensors are not.

    python collectives_of_tensor_parallelism.py FOLDER
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from test_costs import VARIANTS, small_config
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups


NUM_RANKS, NUM_TOKENS = 2, 32


class ReceivedBytes(TorchDispatchMode):
    """Bytes that a rank receives of others, by collective."""

    def __init__(self):
        super().__init__()
        self.sizes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "c10d" in name and ("all_reduce" in name or "allreduce" in name):
            (tensor,) = args[0] if isinstance(args[0], list) else args[:1]
            self.sizes["all-reduce"] += 2 * (NUM_RANKS - 1) * tensor.nbytes // NUM_RANKS
        elif "c10d" in name and "all_gather" in name:
            self.sizes["all-gather"] += (NUM_RANKS - 1) * args[0].nbytes
        elif "c10d" in name and not any(word in name for word in ("wait", "wrap")):
            raise NotImplementedError(f"{name} is not counted")
        return function(*args, **(kwargs or {}))


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(NUM_RANKS))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    found = {}
    for name in sys.argv[2:]:
        # Statistics of BatchNorm are not counted.
        config = small_config(**VARIANTS[name], query_norm=None)
        PeerForCausalLM(config).save_pretrained(folder / name)
        model = PeerForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_plan="auto"))
        optimizer = RowAdamW(expert_parameter_groups(model.train(), learning_rate=1e-3))
        tokens = torch.ones(1, NUM_TOKENS, dtype=torch.int64)
        with ReceivedBytes() as received:
            model(tokens, labels=tokens).loss.backward()
        found[name] = received.sizes
        del optimizer
    (folder / "received.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
