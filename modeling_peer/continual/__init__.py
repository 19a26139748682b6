# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Continual learning without catastrophic forgetting: added experts, frozen experts, sparse memory finetuning."""
