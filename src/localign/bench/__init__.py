"""`localign bench`: the speed of alignment steps and loading on this machine, against plain PyTorch in one run."""
