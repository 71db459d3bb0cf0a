"""`split_heads` by the emulated kernels; the same arguments as every backend's."""

from fastvit.cpu.split_heads import forward
from fastvit.emulated.ops import split_heads_backward as backward

__all__ = ["backward", "forward"]
