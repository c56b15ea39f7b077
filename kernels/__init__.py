"""Kernels, shipped as `pdlab.kernels`: one folder each, holding the kernel, its plain PyTorch reference, and a benchmark.

paged_attention  attention over a paged KV cache, and storing into it
kv_blocks        KV blocks gathered into a transfer buffer and scattered out of it
fused            RMS norm with residual, SiLU times gate, rotary embedding
linear           products of a few vectors with a weight in float32, bfloat16, int8 or int4
experts          the same of routed experts: each chosen one's weights are read once
decode           all layers of a decode step of few sequences in one call

On CPUs they are C++, compiled at first use (cpu_build.py); on CUDA, Triton; elsewhere, and where there is no compiler, the references.
"""
