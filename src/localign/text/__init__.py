"""Text that somebody else wrote: bounded readers with one error line, and safe ways to print it."""
