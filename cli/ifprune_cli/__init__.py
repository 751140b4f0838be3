"""The `ifprune` command."""
