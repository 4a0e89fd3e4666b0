"""Checkpoints: whole and sharded, both sealed with checksums."""
