"""`Traffic`: bytes that a program hands to torch.distributed's collectives, whoever calls them."""

from twa.distributed.traffic import Traffic

__all__ = ["Traffic"]
