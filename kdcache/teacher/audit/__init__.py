"""Checks of caches: against their teacher, and against labels.

verify.py          scores from the cache; the cache against the teacher
first_views.py     whole images of a cache
audit.py           where the teacher's classes are good, and how sure it is
depth_audit.py     its depth against labels
store_audit.py     both of these
topk_error.py      the error in the gradient if fewer classes are kept
figures.py         the audit as pictures
value_figures.py   depth as pictures
pseudo_labels.py   pseudo labels as PNG files
pseudo_quality.py  pseudo labels against labels: coverage, precision, mIoU
"""
