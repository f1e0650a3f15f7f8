"""Optional: what makes networks faster on a CPU. Everything else works without this folder.

Networks are changed in place: modules become those of a subclass that computes the same in another
way, with the parameters that they have.
"""

from model.cpu.allocator import keep_freed
from model.cpu.dropout import fast_dropout
from model.cpu.fused import fuse
from model.cpu.native import available

__all__ = ["available", "fast_dropout", "fuse", "keep_freed"]
