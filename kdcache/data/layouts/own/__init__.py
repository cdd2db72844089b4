"""Layouts of data of one's own, whose classes are in a `classes.txt`.

folder.py   images/SPLIT and labels/SPLIT
mmseg.py    img_dir/SPLIT and ann_dir/SPLIT
pairs.py    which label belongs to which image, by what their names end with
"""
