"""`localign vlm demo`: a small language model, and vision-language models trained side by side on drawn scenes."""
