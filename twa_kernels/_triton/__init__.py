"""Triton kernels of every op, for NVIDIA and AMD GPUs; and for CPU tensors under the interpreter (TRITON_INTERPRET=1).

words.py has the pieces (decode, byte_perm, dp4a, fixed point), <op>.py the kernels, ops.py the launches, config.py their numbers.
"""
