"""Triton kernels of every op, for NVIDIA and AMD GPUs.

Under the interpreter (TRITON_INTERPRET=1) they run on CPU tensors. words.py has the pieces (decode,
byte_perm, dp4a, fixed point), <op>.py the kernels of an op and their launch, config.py the numbers.
"""
