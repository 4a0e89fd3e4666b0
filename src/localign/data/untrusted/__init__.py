"""What guards the reading of files that somebody else made: bounds on images, and faults of the machine."""
