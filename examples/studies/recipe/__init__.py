"""A recipe for PEER, found and compared at equal compute and at equal time."""
