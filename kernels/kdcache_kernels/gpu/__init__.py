"""The GPU family: Triton.

loss.py         the fused loss: which kernel computes it
counts.py       its denominators by themselves
prep.py         its masks, counts and targets
prepared.py     the result of prep.py
geometry.py     windows and the pixels of a cell
common.py       launches and what kernels share
sample.py       one target pixel
bilinear_cell/  the corners, pixels and gradient of a cell
cells.py        a cell per lane
tiles.py        tiles of any window, whose gradient is in tile_gradient.py
pixels.py       pixel by pixel
topk.py         packing and densifying
argmax.py       the teacher's class and confidence
offline.py      compiling all of it for a GPU that is not there
on_cells/       the losses on cells
"""
