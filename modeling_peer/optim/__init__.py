# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers for models with expert tables, frozen rows, and checkpoints to resume from."""
