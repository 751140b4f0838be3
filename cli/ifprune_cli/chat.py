"""`ifprune chat`: being written."""


def chat() -> None:
    """Chat."""
