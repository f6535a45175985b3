"""Signatures of the functions of MATE's FlashAttention-3 wrapper, release by release.

Names, order and defaults as read in the sources of 0.1.3, 0.2.0, 0.2.1 and 0.2.2; every parameter
may be passed by position or by name. "later" is a state of the sources after 0.2.2 that no public
release is known to be. ``tests/kernels/test_real_mate.py`` compares them with a MATE that is at
hand.
"""

from __future__ import annotations

WITH_KVCACHE = (
    "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None "
    "cu_seqlens_q=None cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None "
    "q_descale=None k_descale=None v_descale=None softmax_scale=None causal=False "
    "window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True "
    "scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False "
    "sinks=None s_aux=None cp_world_size=1 cp_rank=0 cp_tot_seqused_k=None"
)
VARLEN_HEAD = (
    "q k v cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None "
    "seqused_q=None seqused_k=None"
)
VARLEN_TAIL = (
    "q_descale=None k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 "
    "softcap=0.0 scheduler_metadata=None num_splits=0 pack_gqa=None deterministic=False "
    "sm_margin=0 return_attn_probs=False return_softmax_lse=False sinks=None s_aux=None "
    "cp_world_size=1 cp_rank=0 cp_tot_seqused_k=None"
)
UNPAGED = f"{VARLEN_HEAD} softmax_scale=None causal=False qv=None"
PAGED = f"{VARLEN_HEAD} page_table=None block_table=None softmax_scale=None causal=False qv=None"
METADATA = (
    "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens "
    "qkv_dtype=torch.bfloat16 headdim_v=None cu_seqlens_q=None cu_seqlens_k_new=None "
    "cache_leftpad=None page_size=None max_seqlen_k_new=0 causal=False window_size=(-1,-1) "
    "attention_chunk=0 has_softcap=False num_splits=0 pack_gqa=None sm_margin=0"
)
SIGNATURES = {
    "0.1.3": {
        "flash_attn_with_kvcache": WITH_KVCACHE,
        "flash_attn_varlen_func": f"{UNPAGED} {VARLEN_TAIL}",
        "get_scheduler_metadata": METADATA,
    },
    "0.2.0": {
        "flash_attn_with_kvcache": WITH_KVCACHE,
        "flash_attn_varlen_func": f"{PAGED} q_v=None {VARLEN_TAIL} out=None",
        "get_scheduler_metadata": METADATA,
    },
    "0.2.2": {
        "flash_attn_with_kvcache": WITH_KVCACHE,
        "flash_attn_varlen_func": f"{PAGED} {VARLEN_TAIL} out=None",
        "get_scheduler_metadata": METADATA,
    },
    "later": {
        "flash_attn_with_kvcache": f"{WITH_KVCACHE} only_qv=False",
        "flash_attn_varlen_func": f"{PAGED} {VARLEN_TAIL} out=None",
        "get_scheduler_metadata": f"{METADATA} has_qv=False",
    },
}


SIGNATURES["0.2.1"] = SIGNATURES["0.2.2"]


RELEASES = {
    "0.1.3": "0.1.3",
    "0.2.0": "0.2.0",
    "0.2.1": "0.2.1",
    "0.2.2": "0.2.2",
    "later": "0.2.7",
}
"""The states of the sources, and the version that an installation of each has in these tests."""
