"""The window of an image that a foreign augmentation shows, and whether it is mirrored.

traced.py         `traced`: a transform of torchvision v2 or albumentations that also returns window and flip
footprint.py      a window and a flip, moved by crops, resizes and flips
torchvision.py    footprints as a kind of tensor that torchvision's transforms move with the image
albumentations.py footprints from the parameters that albumentations keeps
"""

from kdcache.data.tracing.footprint import Footprint
from kdcache.data.tracing.traced import traced

__all__ = ["Footprint", "traced"]
