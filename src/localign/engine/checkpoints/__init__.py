"""Checkpoints of replicated and sharded runs, protected by checksums."""
