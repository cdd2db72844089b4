"""Procedural street scenes with labels, for tests and demonstrations.

styles.py     materials, objects and camera of scenes
street.py     drawing one scene
generate.py   a data set of them
"""
