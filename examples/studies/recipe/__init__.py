"""The paper's comparison at equal compute, and its ablations."""
