"""From an image and a window to the pixels of a view.

fit.py        squashed, cropped or padded: the size of a view at zoom 1
view.py       windows, and the one rendering that teacher and training share
resample.py   resizing, antialiased
compiled.py   its compiled loops
recolour.py   colour jitter
depth.py      depth labels, and the zoom of a view
nearest.py    the compiled loops of it
rand_augment.py  RandAugment's colour operations
augment.py    random windows and colours
"""
