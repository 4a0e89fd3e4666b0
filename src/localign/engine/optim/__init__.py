"""Optimizers and schedule: AdamW, Muon, learning rates, clipping, averaged weights."""
