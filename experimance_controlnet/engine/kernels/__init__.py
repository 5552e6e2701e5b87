"""The arithmetic that torch alone does too slowly, as Triton kernels.

Every kernel stands beside a reference in plain torch, which says what it means and which the tests
compare it with. CPU tensors, and CUDA devices without Triton, take the reference. Kernels know
nothing of models.
"""
