"""The bridge to lmms-eval: our models behind its model interface, and benchmarks that it lacks as its tasks.

lmms-eval is an extra of the package. Only ``registration`` can be imported without it.
"""
