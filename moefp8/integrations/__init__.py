"""Where other libraries let an experts implementation in: ``transformers`` and ``torchtitan``.

Each module needs its library (extras of the same names); importing ``moefp8`` needs neither.
"""
