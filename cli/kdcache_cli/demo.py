"""`kdcache demo`."""


def demo() -> None:
    """Soon."""
