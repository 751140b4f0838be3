"""Sliced FFNs: which can be sliced, where their neurons lie in memory, how a switch moves them."""
