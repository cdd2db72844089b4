"""Layouts of your own data, with classes, if any, in a `classes.txt`.

folder.py   images/SPLIT and labels/SPLIT
mmseg.py    img_dir/SPLIT and ann_dir/SPLIT
images.py   pictures without labels
data_yaml.py   Ultralytics' data.yaml
pairs.py    which label belongs to which image, by what their names end with
"""
