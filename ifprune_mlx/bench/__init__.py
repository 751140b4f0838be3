"""Speed and memory: models of the same weights timed in turn, each in a process of its own."""
