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
`transformers serve`, with all its flags, for PEER models and for models with merged grafts:

    python -m modeling_peer.serving runs/quickstart/peer-toy --continuous-batching

The server of Transformers looks up the class that a checkpoint names in `architectures` in its own package and nowhere
else, `--trust-remote-code` or not.
"""

import sys
from importlib.util import find_spec

import transformers
import typer
from transformers import AutoModelForCausalLM
from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..graft_merged import CLASS_PREFIX
from ..modeling_peer import PeerForCausalLM


def name_models_in_transformers() -> None:
    """Let `transformers` have the names of this package's models for generation."""
    grafted = [f"{CLASS_PREFIX}{base}" for base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    for name in [PeerForCausalLM.__name__, *grafted]:
        # The class of merged grafts does not exist before a configuration of it is read, and a checkpoint's own code
        # has another class of the name: the auto class finds each.
        setattr(transformers, name, AutoModelForCausalLM)


def missing_packages() -> str | None:
    """What to do if packages that the server needs are not installed. Transformers names an extra of its own."""
    missing = [name for name in ("fastapi", "openai", "pydantic", "uvicorn") if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"The server needs packages of the extra `serving`: {', '.join(missing)}. In the folder of modeling-peer:\n"
        f"    {sys.executable} -m pip install --editable '.[serving]'"
    )


if __name__ == "__main__":
    if not {"--help", "-h"} & set(sys.argv) and (message := missing_packages()):
        sys.exit(message)
    name_models_in_transformers()
    typer.run(Serve)
