"""``python -m moefp8.bench``: the published tables, measured on the machine it runs on.

grouped-mm     forward and backward of the grouped product beside bf16, torch and torchao
quantize       the quantisers beside a plain copy
accumulation   what short accumulators and block scales cost in accuracy
"""
