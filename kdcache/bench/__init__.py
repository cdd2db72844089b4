"""Benchmarks: what is timed here is timed beside its rivals, in one run.

timing.py    one step, and several in turn
header.py    the header of every result
kernels/     the fused loss beside eager PyTorch and torch.compile
"""
