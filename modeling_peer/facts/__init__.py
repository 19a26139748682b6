# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Teaching facts to a pretrained model: tables of facts, the keys by which they are found, and their experts."""
