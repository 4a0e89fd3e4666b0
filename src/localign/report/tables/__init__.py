"""Results as rows, and rows as Markdown, HTML, LaTeX, CSV and terminal tables."""
