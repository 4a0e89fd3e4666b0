"""The machine under a run: CPU settings, memory, and the micro-batch that fits into it."""
