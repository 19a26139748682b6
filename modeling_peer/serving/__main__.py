# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Run `transformers serve`, with all its flags, for PEER models and models with merged grafts:

    python -m modeling_peer.serving runs/quickstart/peer-toy --continuous-batching
"""

import transformers
import typer
from transformers import AutoModelForCausalLM
from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..graft_merged import CLASS_PREFIX
from ..modeling_peer import PeerForCausalLM


if __name__ == "__main__":
    # The server looks up the class that a checkpoint names in `architectures` as an attribute of `transformers`, and
    # has no other way to a class. This process does nothing but serve. The auto class also finds the class of merged
    # grafts, which does not exist before a configuration is read, and that of a checkpoint's own code.
    grafted = [f"{CLASS_PREFIX}{base}" for base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    for name in [PeerForCausalLM.__name__, *grafted]:
        setattr(transformers, name, AutoModelForCausalLM)
    typer.run(Serve)
