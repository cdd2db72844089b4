"""Procedural street scenes with labels, for tests and demonstrations.

street.py     drawing one scene
generate.py   a data set of them
"""
