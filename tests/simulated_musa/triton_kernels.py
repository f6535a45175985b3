"""A Triton kernel for the tests of the device, in a module of its own: the interpreter reads its
source.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def add_one(pointer: tl.tensor, size: tl.constexpr) -> None:
    """Add one to the first ``size`` numbers at ``pointer``."""
    place = tl.arange(0, size)
    tl.store(pointer + place, tl.load(pointer + place) + 1)
