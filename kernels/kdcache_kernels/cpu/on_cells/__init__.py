"""The losses on cells on the CPU: cells.py is shared, and each loss has its module."""
