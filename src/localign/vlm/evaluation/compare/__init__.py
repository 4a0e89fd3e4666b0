"""Comparison of models from their stored answers: differences, panels, tables and charts."""
