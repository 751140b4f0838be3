"""One model over several processes or Macs, on mlx.distributed."""
