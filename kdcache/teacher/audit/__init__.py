"""Stores judged: against their teacher, and against labels.

verify.py          scores from the store; the store against the teacher
first_views.py     whole images of a store
audit.py           how good the teacher's classes are where, and how sure it is
depth_audit.py     its depth beside labels
store_audit.py     both of these
topk_error.py      what keeping fewer classes would do to the gradient
figures.py         the audit as pictures
value_figures.py   depth as pictures
pseudo_labels.py   pseudo labels as PNG files
pseudo_quality.py  pseudo labels beside labels: coverage, precision, mIoU
"""
