"""Flags of the verbs, made from the tables of settings.

signature.py      a verb's signature from the settings of tables
shared_flags.py   flags that many verbs have
build_flags.py    of a build: teachers, views, what is stored
compare_flags.py  of compare and report
model_flags.py    of a trained model, and opening it
"""
