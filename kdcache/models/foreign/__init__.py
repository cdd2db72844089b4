"""Networks that were not written for kdcache: which images they take, and what their answers mean.

processor.py   what a network expects of its images
sizes.py       a first image that a network takes, and what it shows of the network
answers.py     heads and features out of a network's answer
tokens.py      maps out of tokens
peel.py        native stride: the last resize is taken off
readings.py    what the answers of transformers and timm mean
hub_spec.py    the spelling of hf: and timm:
image_settings.py  a model's own image processor
wrapped.py     any module behind the interface of kdcache
"""
