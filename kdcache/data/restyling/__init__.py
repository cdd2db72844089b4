"""Restyling without a network: a labelled source in the colours of a target, for domain adaptation.

transfer.py   one image in the style of another: Fourier domain adaptation, histogram matching
restyle.py    a data set in the style of another, as a folder of its own
"""
