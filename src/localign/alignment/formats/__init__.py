"""Exports for other software, compared with the backbone before they count as written."""
