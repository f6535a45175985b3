"""Triton on the simulated device: kernels run in Triton's interpreter, on the device's memory."""

from __future__ import annotations

import os
from typing import Any

import torch

from torch_musa import _MUSAC
from torch_musa._launch import on_host


def install() -> None:
    """Let Triton's interpreter take tensors of the device, and let graphs record its launches."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    from sglang_musa_ext.cpu import stand_ins

    stand_ins.interpret_triton()
    executor: Any = interpreter.GridExecutor
    launch = executor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        fixed = set(self.constexprs)
        named = [name not in fixed for name in self.arg_names]
        args = tuple(_argument(arg, number) for arg, number in zip(args, named, strict=False))
        kwargs = {name: _argument(value, name not in fixed) for name, value in kwargs.items()}

        def step() -> None:
            with torch.inference_mode():
                launch(self, *args, **kwargs)

        step()
        if _MUSAC.capturing():
            _MUSAC.record(step)

    executor.__call__ = call
    builder: Any = interpreter.InterpreterBuilder
    multiply = builder.create_dot
    builder.create_dot = lambda self, a, b, *options: multiply(
        self, _without_bfloat16(a), _without_bfloat16(b), *options
    )
    # The arguments are in host memory already, and are written in place.
    executor._init_args_hst = lambda self, args, kwargs: (list(args), kwargs)
    executor._restore_args_dev = lambda self, *_: None


def _argument(value: Any, computed_with: bool) -> Any:
    """Return ``value`` in host memory; a boolean that the kernel computes with as a number, since
    the interpreter knows no single boolean.
    """
    if isinstance(value, bool) and computed_with:
        return int(value)
    return on_host(value)


def _without_bfloat16(value: Any) -> Any:
    """Return bfloat16 as float32: the interpreter multiplies bfloat16's bits as integers."""
    import numpy
    import triton.language as tl

    if value.dtype.scalar != tl.bfloat16:
        return value
    bits = value.data.astype(numpy.uint32) << 16
    return type(value)(bits.view(numpy.float32), tl.float32)
