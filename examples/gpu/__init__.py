"""Checks and measurements of PEER on a machine with a GPU, in one command."""
