"""`add_norm` by the emulated kernels; the same arguments as every backend's."""

from fastvit.emulated.ops import add_norm as forward
from fastvit.emulated.ops import add_norm_backward as backward

__all__ = ["backward", "forward"]
