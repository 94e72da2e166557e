"""The version: that of `twa_kernels`, since both packages are one distribution."""

from twa_kernels.version import __version__, described

__all__ = ["__version__", "described"]
