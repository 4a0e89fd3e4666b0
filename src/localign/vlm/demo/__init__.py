"""`localign vlm demo`: questions on drawn scenes, a small language model, models trained side by side."""
