"""Terms for images without labels.

pseudo.py       the classes that a teacher is sure of
predictions.py  the student's predictions only
"""
