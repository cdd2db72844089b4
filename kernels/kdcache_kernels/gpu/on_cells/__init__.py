"""The losses on cells on CUDA: cells.py has what they share, and each its module."""
