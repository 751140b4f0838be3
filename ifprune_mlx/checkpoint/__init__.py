"""The IFP checkpoint on disk: format, neuron files, budgets, the hub."""
