"""The method: masks, targets (teacher), student (encoder and decoder), losses."""
