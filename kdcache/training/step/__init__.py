"""One optimizer step, and the ways to run it.

optim.py        optimizers and learning rates
ema.py          a moving average of the weights
weak_view.py    pseudo labels of the weak view, made before a step
eager.py        operation by operation
compiled.py     eager, compiled or graphed: which one runs
cuda_graph.py   as a CUDA graph
gradient_norms.py  of terms and tasks
accumulate.py   from parts of a batch
ddp.py          the step of one of several processes
batch_fit.py    running out of memory, and the batch sizes that fit
"""
