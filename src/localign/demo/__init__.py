"""`localign demo`: the whole method on drawn scenes, in a few minutes."""
