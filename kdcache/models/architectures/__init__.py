"""The networks that names of the registry stand for.

tiny.py                `kdcache:tiny`, `kdcache:base`
hydra.py               `kdcache:hydra`, segmentation and depth on one encoder
torchvision_heads.py   torchvision's FCN, DeepLab and LR-ASPP
deeplab.py             DeepLab as the documents train it
segformer.py           SegFormer
smp.py                 segmentation_models_pytorch
yolo.py                YOLO26 of ultralytics
hub.py                 weights of published models
hub_models.py          hf: and timm:, with their own processors
"""
