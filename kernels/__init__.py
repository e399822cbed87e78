"""The Triton kernels of the three ops, one file an op: the kernels, and the functions that launch them.

Kernels of the ops, and adapt and the norm of a decode step, take their arguments flat, however many: a named tuple
among them makes binding a launch's arguments about twice as dear for the host, where a small launch is bound by it.
Context's encoders, launched once for users who are added, and attention's, the longest of a step, take them in groups.

Importing needs triton but no GPU. Arguments are taken as checked by the public ops; what those cannot see without
waiting for the GPU (slots and choices out of range) is stated there and not checked again here.
"""
