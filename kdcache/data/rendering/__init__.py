"""From an image and a window to the pixels of a view.

fit.py        squashed, cropped or padded: what a view at zoom 1 measures
view.py       windows, and the one rendering that teacher and training share
resample.py   resizing, antialiased
compiled.py   the compiled loops of it
recolour.py   colour jitter
depth.py      depth labels, and by how much a view is zoomed
nearest.py    the compiled loops of it
rand_augment.py  RandAugment's colour operations
augment.py    what is drawn at random
"""
