"""A command line in a process of its own, or in several that torchrun starts."""

from __future__ import annotations

import shlex
import sys

from localign.cli import main

if __name__ == "__main__":
    sys.exit(main(shlex.split(sys.argv[1])))
