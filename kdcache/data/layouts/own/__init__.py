"""Layouts of data of one's own, whose classes are in a `classes.txt` or in the annotations.

folder.py   images/SPLIT and labels/SPLIT
mmseg.py    img_dir/SPLIT and ann_dir/SPLIT
kaggle.py   SPLIT/images and SPLIT/masks, images and masks, SPLIT and SPLIT_labels, or pairs in one folder
coco.py     annotations in JSON, and polygons.py, which draws them
pairs.py    which label belongs to which image, by what their names end with
"""
