"""`localign bench`: what the vectorised labels and the one-pass suite save, against the plain way, in one run."""
