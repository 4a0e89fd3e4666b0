"""Pre-training of the embedded backbone on scenes, from labels of whole images."""
