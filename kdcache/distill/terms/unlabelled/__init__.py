"""Terms for images without labels.

pseudo.py       the classes that a teacher is sure of
consistency.py  the classes that a teacher, the student or its moving average is sure of on the weak view
predictions.py  the student's predictions alone
"""
