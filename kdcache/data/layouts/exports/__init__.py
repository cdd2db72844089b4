"""Exports of labelling tools and shared masks, which `data convert` reads. Other verbs name that command.

base.py           what the exports share: splits, classes, images, errors
shapes.py         labels that are drawn from shapes
coco.py           COCO's annotations of objects
kaggle.py         images with masks, as on Kaggle and of Roboflow
cvat.py           CVAT for images 1.1 (XML) and Segmentation mask 1.1
labelme.py        LabelMe's JSON and the folders of labelme2voc
label_studio.py   Label Studio's JSON and Brush labels to PNG
yolo.py           polygons of YOLO
"""
