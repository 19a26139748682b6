"""How many bits of facts PEER, dense, MoE and PKM models store at equal compute."""
