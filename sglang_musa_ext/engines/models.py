"""Models without weights, as configurations that SGLang loads with ``load_format="dummy"``.

Their shapes are those of a family's real models; sizes are the caller's. SGLang draws the weights
itself, the same ones every time; for a comparison of answers take those of ``dummy_weights``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMON: Mapping[str, Any] = {
    "vocab_size": 4096, "max_position_embeddings": 65536, "rope_theta": 10000.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "dtype": "bfloat16", "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 1024, "intermediate_size": 2048,
    "num_hidden_layers": 4,
}  # fmt: skip
"""Fields of every configuration whose family or caller says nothing else."""

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    },
    # The draft model of EAGLE: one layer, which takes the target's hidden states.
    "eagle": {
        "architectures": ["LlamaForCausalLMEagle"], "model_type": "llama", "num_hidden_layers": 1,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    },
    # Every other layer has a sliding window; the scores have a softcap.
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128,
        "query_pre_attn_scalar": 128, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 512, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True,
    },
    # Windows of 128 beside full layers, attention sinks, and experts.
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "intermediate_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 128, "attention_bias": True,
        "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_theta": 150000.0,
        "initial_context_length": 4096, "pad_token_id": 0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False,
        },
    },
    # Multi-head latent attention with DeepSeek-V3's dimensions. All layers are dense unless the
    # caller says otherwise.
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": 256, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1000,
        "moe_intermediate_size": 512, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
        "bos_token_id": 0, "eos_token_id": 1,
    },
}  # fmt: skip


def write_model(directory: Path, family: str, **changes: Any) -> Path:
    """Write a model configuration of ``family`` with ``changes``; return ``directory``.

    Raises:
        KeyError: there is no such family.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, **FAMILIES[family], **changes}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory
