"""A study of the rates at which dense, MoE, PKM and PEER models store most facts."""
