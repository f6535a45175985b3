"""A Triton kernel for tests of the device, in a module whose source the interpreter reads."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def add_one(pointer: tl.tensor, size: tl.constexpr) -> None:
    """Add one to the first ``size`` numbers at ``pointer``."""
    place = tl.arange(0, size)
    tl.store(pointer + place, tl.load(pointer + place) + 1)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(left: tl.tensor, right: tl.tensor, product: tl.tensor, size: tl.constexpr) -> None:
    """Write the product of two square matrices."""
    rows, columns = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    place = rows * size + columns
    tl.store(product + place, tl.dot(tl.load(left + place), tl.load(right + place)))
