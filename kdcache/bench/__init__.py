"""Benchmarks: everything is timed together with its rivals, in one run.

timing.py    one step, and several in turn
header.py    the header of every result
kernels/     the fused loss against eager PyTorch and torch.compile
"""
