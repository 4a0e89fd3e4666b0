"""Benchmarks of vision-language models: questions read from official files, and answers to them scored."""
