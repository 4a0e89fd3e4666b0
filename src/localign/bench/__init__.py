"""`localign bench`: speed of alignment steps and of loading on this machine, against plain ways in the same run."""
