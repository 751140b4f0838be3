"""Training of sparsity predictors and of the models they prune. Nothing of the runtime imports it."""
