"""One file per vision-language benchmark, and the table of their names."""
