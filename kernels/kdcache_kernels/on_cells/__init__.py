"""The loss of relations, which is taken on the target's cells and not in every pixel.

relations.py has the public functions, problem.py their input, the same for every family, reference.py plain PyTorch,
and library.py the operators. cpu/on_cells and gpu/on_cells compute it.
"""
