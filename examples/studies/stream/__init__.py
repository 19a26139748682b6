"""Continual learning of a stream of texts by a small model."""
