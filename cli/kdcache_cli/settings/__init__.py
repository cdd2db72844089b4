"""Flags of the verbs, made from the tables of settings.

signature.py    a verb's signature from the settings of tables
"""
