"""Exports of labelling tools, which `data convert` reads. No other verb does: each names the command.

    base.py           what the exports share: splits, classes, images, refusing
    shapes.py         labels that are drawn from shapes
    cvat.py           CVAT for images 1.1 (XML) and Segmentation mask 1.1
    labelme.py        LabelMe's JSON and the folders of labelme2voc
    label_studio.py   Label Studio's JSON and Brush labels to PNG
    yolo.py           polygons of YOLO

COCO's annotations and Roboflow's masks are in own/: coco.py and kaggle.py.
"""
