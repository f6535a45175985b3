"""The comparisons of ``SGLANG_MUSA_EXT_CHECK``, and the errors they raise."""

from __future__ import annotations

from typing import Any

import torch

from sglang_musa_ext import envs
from sglang_musa_ext.attention.calls import Arguments, CallGeometry
from sglang_musa_ext.kernels.provider import reference_kernels


class StalePlanError(RuntimeError):
    """A reused plan differs from the one that its call should have."""


class WrongOutputError(RuntimeError):
    """An output differs from that of the reference kernels."""


_OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative and absolute; a few units in the last place of each dtype."""
_FP8_ROUNDING = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
"""The error that kernels reading fp8 may have beside that, of the largest value: they round their
probabilities to it, which the reference does not.
"""


def require_same_plan(
    used: torch.Tensor, fresh: torch.Tensor, geometry: CallGeometry, place: str
) -> None:
    """Compare a reused plan with one computed now.

    Args:
        used: int32, what is compared of the plan that a call was about to use.
        fresh: the same of the plan that its arguments give.
        geometry: of the call.
        place: which call of which layer it is, for the error.

    Raises:
        StalePlanError: they differ.
    """
    if torch.equal(used, fresh):
        return
    raise StalePlanError(
        f"A reused plan is not the plan of its call: {place}, {geometry}.\n"
        f"reused: {used.tolist()}\nfresh:  {fresh.tolist()}\n"
        "This is a fault of sglang-musa-ext. Please report it; "
        f"{envs.FORCE_UPDATE_METADATA}=1 serves without reuse."
    )


def require_reference_output(
    result: Any, arguments: Arguments, device: torch.device, place: str
) -> None:
    """Compare the output of a call over a paged cache with the reference kernels' output.

    Args:
        result: what the call returned.
        arguments: of the call; its cache holds the keys that the result was computed from.
        device: of the tensors.
        place: which call of which layer it is, for the error.

    Raises:
        WrongOutputError: they differ by more than the tolerance of the dtype.
    """
    kernels = reference_kernels()
    plan = reference_plan(arguments, device)
    expected = kernels.flash_attn_with_kvcache(
        **arguments | {"scheduler_metadata": plan, "out": None}
    )
    expected, output = output_of(expected), output_of(result)
    read = arguments["q"].dtype
    relative, absolute = _tolerances(expected, read)
    wrong = wrong_values(output, expected, read)
    if wrong.any():
        raise WrongOutputError(
            f"The output of {place} differs from the reference in {int(wrong.sum())} of "
            f"{wrong.numel()} values (tolerance {relative:g} relative, {absolute:.3g} absolute): "
            f"{CallGeometry.of(arguments, kernels)}. "
            "Please report this with the model and the versions of the kernels."
        )


def wrong_values(output: torch.Tensor, expected: torch.Tensor, read: torch.dtype) -> torch.Tensor:
    """Tell for each value whether it is further from ``expected`` than its dtypes explain.

    Args:
        output: of the kernels.
        expected: of the reference kernels; NaN in rows that no query owns.
        read: the dtype of queries, keys and values.
    """
    relative, absolute = _tolerances(expected, read)
    return ~torch.isclose(output, expected, rtol=relative, atol=absolute) & ~expected.isnan()


def _tolerances(expected: torch.Tensor, read: torch.dtype) -> tuple[float, float]:
    """Return the relative and the absolute error that is allowed."""
    tolerance = _OUTPUT_TOLERANCE[expected.dtype]
    rounding = _FP8_ROUNDING.get(read)
    if rounding is None:
        return tolerance, tolerance
    return tolerance, tolerance + rounding * float(expected.nan_to_num(0.0).abs().max())


def reference_plan(arguments: Arguments, device: torch.device) -> Any:
    """Return what the reference kernels need to plan for themselves: in MLA, a workspace."""
    kernels = reference_kernels()
    if arguments.get("qv") is None:
        return None
    assert kernels.mla_plan_bytes is not None
    geometry = CallGeometry.of(arguments, kernels)
    size = kernels.mla_plan_bytes(
        geometry.batch_size, geometry.max_seqlen_q, geometry.num_heads_q, device
    )
    return torch.zeros(size, dtype=torch.uint8, device=device), False


def output_of(result: Any) -> torch.Tensor:
    """Return the output of a result that may have a log-sum-exp beside it."""
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output
