"""Optimizers (AdamW, Muon), learning rates, gradient clipping and averaged weights."""
