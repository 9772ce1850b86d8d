"""``python -m moefp8.bench``: the published tables, measured on the machine it runs on.

grouped-mm     forward and backward of the grouped product beside bf16, torch and torchao
gemm           the product alone beside dense cuBLAS FP8
quantize       the quantisers beside a plain copy
accumulation   what short accumulators and block scales cost in accuracy, and promotion in speed
moe-layer      the whole layer beside the same one in bf16: time, memory, and where the time goes
markdown       the JSON of any of these as tables for a page
"""
