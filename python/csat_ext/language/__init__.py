"""A decoder-only language model over bytes whose attention is a causal form of CSAT, or full."""
