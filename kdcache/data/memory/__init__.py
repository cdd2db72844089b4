"""Data sets in memory: PyTorch's map-style data sets, and Hugging Face's.

from_dataset.py   `from_dataset`: such a data set as a split
items.py          an item as image and labels
opened.py         the splits that this process has made, by the name that stands for them in recipes
"""

from kdcache.data.memory.from_dataset import from_dataset

__all__ = ["from_dataset"]
