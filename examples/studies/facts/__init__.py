"""Continual learning of new facts by a pretrained model."""
