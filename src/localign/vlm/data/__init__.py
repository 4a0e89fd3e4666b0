"""From conversations in JSON files to batches of tokens and pixels."""
