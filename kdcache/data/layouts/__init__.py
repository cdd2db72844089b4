"""Layouts: how data sets lie on disk, and what the numbers in their label files mean.

    base.py         the interface of a layout, and errors for what a split must not have
    scan.py         finding images and labels, by folder or by list
    file_split.py   the samples that were found, read one by one
    depth.py        from the numbers of a depth file to metres
    label_ids.py    tables from the numbers of a label file to class ids
    own/            folder, mmseg, images: your own data
    exports/        kaggle, coco and exports of labelling tools, which are converted first
    published/      camvid, voc, cityscapes, gta5, ade20k, kitti_semantic, kitti_depth, nyu
    registry.py     which of them a folder has
    converted.py    a folder that was converted, and its source

The package itself is empty: `kdcache.data.layout` is the door.
"""
