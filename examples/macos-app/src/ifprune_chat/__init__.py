"""A chat window around ifprune_mlx: the model runs in this process, on the neurons that each message selects."""
