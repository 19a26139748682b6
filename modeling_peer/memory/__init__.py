# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Where expert tables lie: huge pages, mapped files, and host memory beside a GPU."""
