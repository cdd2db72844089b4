"""What the tests of metrics share."""

from labelled import folder, model, split

__all__ = ["folder", "model", "split"]
