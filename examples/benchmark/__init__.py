"""A benchmark of PEER layers against other implementations and other layers."""
