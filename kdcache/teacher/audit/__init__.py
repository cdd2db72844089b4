"""Stores judged: against their teacher, and against labels.

verify.py          scores from the store; the store against the teacher
first_views.py     whole images of a store
audit.py           how good the teacher is where, and how sure
topk_error.py      what keeping fewer classes would do to the gradient
figures.py         the audit as pictures
pseudo_labels.py   pseudo labels as PNG files
"""
