"""Checks of a whole data set.

check.py         reads it once and reports
split_report.py  the report of one split
depth_report.py  the report of its depth labels
sheet.py         samples with their labels in one picture
next_step.py     the command that a check ends with
warnings.py      labels that train nothing, or something unintended
"""
