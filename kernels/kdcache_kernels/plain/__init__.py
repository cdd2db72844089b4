"""The family of plain PyTorch operations, for the CPU: maps of one cell, and small maps of many classes.

loss.py      the loss, and its gradient by hand
teacher.py   the divergence from the teacher in each pixel

It has tensors of label size times classes, which are small in the cases that `impl="auto"` sends here.
"""
