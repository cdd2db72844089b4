"""Procedural street scenes with labels, for tests and demonstrations.

styles.py     what scenes are made of, and by what they are seen
street.py     drawing one scene
generate.py   a data set of them
"""
