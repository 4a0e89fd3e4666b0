"""Commands that prepare and judge images before a run: shard, verify, stats, in21k-p."""
