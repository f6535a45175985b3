"""Quantized matrix products, which nothing here calls: names for SGLang's imports."""

from sgl_kernel import _absent

ggml_dequantize = ggml_moe_a8 = ggml_moe_a8_vec = ggml_moe_get_block_size = _absent
ggml_mul_mat_a8 = ggml_mul_mat_vec_a8 = _absent
