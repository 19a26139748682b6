"""How a graft in place of a feed-forward is best initialized."""
