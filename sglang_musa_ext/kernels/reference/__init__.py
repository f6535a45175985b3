"""FlashAttention-3 in plain PyTorch, behaving like MATE 0.2.2: the kernels of tests, the demo and
checks.

The public functions have MATE's signatures, so an unknown keyword is a ``TypeError``; they refuse
what MATE refuses; and they *use* the scheduler metadata: batch order, query tiles and splits come
from it. What the metadata leaves out is NaN here where a device would leave whatever the memory
held, so that a stale or foreign plan shows.

Differences from MATE, all on purpose:

* float32 is accepted beside bfloat16 and float16, because only float32 makes a token-for-token
  comparison with another attention implementation possible. Everything is computed in float32.
* Any device will do. :data:`~.planning.MULTIPROCESSORS` stands in for the device's own count.
* MATE's second path for unpaged prefill has no metadata; here metadata counts wherever it is given.
* A strided page table, rotary embedding, fp8 descales, context parallelism and new keys in the MLA
  form are refused by name.

A plan that is stale but still launches what the forward combines (say, other key lengths under the
same capacity) gives right output, here as on the device: only comparing plans can find that one.
"""

from sglang_musa_ext.kernels.reference.interface import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from sglang_musa_ext.kernels.reference.mla import mla_plan_bytes
from sglang_musa_ext.kernels.reference.planning import get_scheduler_metadata
from sglang_musa_ext.kernels.reference.refusals import (
    KernelRefusal,
    RefusedFeature,
    RefusedType,
    RefusedValue,
)

__all__ = [
    "KernelRefusal",
    "RefusedFeature",
    "RefusedType",
    "RefusedValue",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "mla_plan_bytes",
]
