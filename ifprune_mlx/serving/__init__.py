"""Serving: many jobs on one model, each under its own selection. The engine; and what speaks HTTP with its clients."""
