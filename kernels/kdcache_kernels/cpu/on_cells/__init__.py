"""The losses on cells on the CPU: cells.py has what they share, and each its module."""
