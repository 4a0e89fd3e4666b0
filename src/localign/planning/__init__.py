"""What an alignment takes before it runs: arithmetic, memory, decoding, hours."""
