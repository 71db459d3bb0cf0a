"""`add_position` by the emulated kernels; the same arguments as every backend's."""

from fastvit.emulated.ops import add_position as forward
from fastvit.emulated.ops import add_position_backward as backward

__all__ = ["backward", "forward"]
