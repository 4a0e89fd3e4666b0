"""Options of `localign vlm ...`."""
