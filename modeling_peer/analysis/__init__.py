# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Costs of a model, usage of its experts, and inference without some of them."""
