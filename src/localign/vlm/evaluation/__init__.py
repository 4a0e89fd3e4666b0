"""The evaluation harness: it asks models, keeps answers, writes results."""
