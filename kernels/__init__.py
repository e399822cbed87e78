"""The Triton kernels of the three ops, one file an op: the kernels, and the functions that launch them.

Importing needs triton but no GPU. Arguments are taken as checked by the public ops; what those cannot see without
waiting for the GPU (slots and choices out of range) is stated there and not checked again here.
"""
