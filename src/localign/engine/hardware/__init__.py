"""CPU settings, memory measurement, and the micro-batch size that fits into memory."""
