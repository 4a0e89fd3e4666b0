"""Runs a command line in its own process, or in several processes under torchrun."""

from __future__ import annotations

import shlex
import sys

from localign.cli import main

if __name__ == "__main__":
    sys.exit(main(shlex.split(sys.argv[1])))
