"""Code that the example scripts, the studies and the benchmark share."""
