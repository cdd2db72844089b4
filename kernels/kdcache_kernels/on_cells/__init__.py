"""The loss of relations, which is computed on the target's cells instead of every pixel.

relations.py has the public functions, problem.py their input, the same for every family, reference.py plain PyTorch,
and library.py the operators. cpu/on_cells and gpu/on_cells compute it.
"""
