"""The CPU family: numba.

loss.py      the fused loss: which loop computes it
counts.py    its denominators by themselves
prepare.py   its masks, counts and targets
geometry.py  windows and the pixels of a cell
cells.py     whole cells
pixels.py    pixel by pixel
terms.py     a pixel's losses and the factors of its gradient
math.py      exponentials, and the compiler's settings
topk.py      packing and densifying
argmax.py    the teacher's class and confidence
on_cells/    the losses on cells
threads.py   one budget of threads
"""
