"""The folder of a run.

beginning.py         the model that a training begins with
folder.py            before its first step
lock.py              one training at a time per folder
checkpointing.py     what a run leaves and goes on from
checkpoint_file.py   full state, replaced whole
metrics_log.py       metrics.jsonl, environment, observers
trackers.py          TensorBoard, W&B, Trackio
training_progress.py the progress as one watches it
sample_panels.py     pictures of fixed samples for them
monitor.py           losses that are not finite, terms that do nothing
"""
