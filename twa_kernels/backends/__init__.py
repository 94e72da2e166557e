"""Implementations of the ops: plain PyTorch (the specification), C++, CUDA C++, Triton."""
