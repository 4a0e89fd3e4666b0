"""The commands `localign data ...`, which prepare and check images before a run."""
