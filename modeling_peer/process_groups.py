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
Process groups of all processes for one purpose each: collectives of one never queue behind those of another, as they
would in the default group, which DistributedDataParallel, FSDP2 and meshes over all processes use. They have its
time-out.
"""

import torch.distributed as dist

from .library_releases import timeout_of_default_group


# By purpose, the group and the default group in whose time it was made.
_groups: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def group_of_all(purpose: str) -> dist.ProcessGroup:
    """
    The group of all processes for a purpose. It is made on first use, for which all processes have to come here.

    Args:
        purpose (`str`): What is sent in it.
    """
    world = dist.group.WORLD
    group, made_in = _groups.get(purpose, (None, None))
    if group is None or made_in is not world:
        group = dist.new_group(timeout=timeout_of_default_group(), group_desc=purpose)
        _groups[purpose] = group, world
    return group
