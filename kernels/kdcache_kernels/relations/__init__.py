"""How predictions vary: Pearson's correlations over classes and over cells, on the target's cells.

ops.py        the public functions
problem.py    their input, the same for every family
reference.py  plain PyTorch
library.py    the operators
"""
