"""Layouts of published data sets, with their own classes and numbers.

camvid.py, voc.py, cityscapes.py, gta5.py, ade20k.py, kitti_semantic.py, kitti_depth.py, nyu.py
"""
