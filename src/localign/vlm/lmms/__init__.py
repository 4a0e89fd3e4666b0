"""The bridge to lmms-eval: our models behind its model interface, and the benchmarks that it lacks as its tasks.

lmms-eval is an extra of the package; only ``table`` can be imported without it.
"""
