"""The losses on cells on CUDA: cells.py is shared, and each loss has its module."""
