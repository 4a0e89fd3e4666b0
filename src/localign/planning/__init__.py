"""Plans of alignments and VLM trainings before they run: parameters, compute, memory, image decoding and hours."""
