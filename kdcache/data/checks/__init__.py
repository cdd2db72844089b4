"""Checks of a whole data set.

check.py         reads it once and reports
split_report.py  the report of one split
depth_report.py  the report of its labels of depth
doubts.py        labels that teach nothing, or another thing than meant
"""
