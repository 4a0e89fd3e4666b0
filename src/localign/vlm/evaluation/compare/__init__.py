"""Comparison of models from their kept answers: differences, panels, tables, figures."""
