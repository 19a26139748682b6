# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Serving models of this package by Transformers, vLLM and MLX."""
