"""Turns dense checkpoints into IFP checkpoints. The runtime, `ifprune_mlx`, never imports this package."""
