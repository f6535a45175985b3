"""FlashAttention-3 in plain PyTorch, behaving like MATE: the kernels of tests, the demo and checks.

The public functions have MATE's signatures, so an unknown keyword is a ``TypeError``, and one more
keyword, ``release``: what MATE does otherwise by release, they do too. They refuse what MATE
refuses; and they *use* the scheduler metadata: batch order, query tiles and splits come from it.
What the metadata leaves out is NaN here where a device would leave whatever the memory held, so
that a stale or foreign plan shows.

Differences from MATE, all on purpose:

* float32 is accepted beside bfloat16 and float16, because only float32 makes a token-for-token
  comparison with another attention implementation possible. Everything is computed in float32,
  attention of fp8 too, whose probabilities MATE rounds to fp8.
* Any device will do. :data:`~.planning.MULTIPROCESSORS` stands in for the device's own count.
* MATE's second path for unpaged prefill has no metadata; here metadata counts wherever it is given.
* Plans of all releases leave keys beyond a window out, as from MATE 0.2.1 on.
* A strided page table, rotary embedding, context parallelism and new keys in the MLA form are
  refused by name.

A plan that is stale but still launches what the forward combines (say, other key lengths under the
same capacity) gives right output, here as on the device: only comparing plans can find that one.
"""

from sglang_musa_ext.kernels.reference.interface import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from sglang_musa_ext.kernels.reference.mla import mla_plan_bytes
from sglang_musa_ext.kernels.reference.planning import get_scheduler_metadata, launched_splits
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
    "launched_splits",
    "mla_plan_bytes",
]
