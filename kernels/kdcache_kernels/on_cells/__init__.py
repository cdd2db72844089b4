"""Losses that are taken on the target's cells, and not in every pixel.

| file | loss |
| --- | --- |
| relations.py | Pearson's correlations over the classes and over the cells (DIST) |
| decoupled.py | the target class apart from all others (DKD) |
| channels.py | where each class is strong: distributions over the cells (CWD) |

Each of these has the public function. problem.py has their input, the same for every family, arguments.py its checks,
reference.py plain PyTorch, library.py the operators. A further loss is a problem, a reference, a function and a module
of its name in cpu/on_cells and gpu/on_cells, whose cells.py have what all share.
"""
