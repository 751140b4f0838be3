"""Selections and what makes them: selectors, the sparsity predictor, caches, named presets."""
