"""`python -m localign`, and what torchrun starts."""

import sys

from localign.cli import main

if __name__ == "__main__":
    sys.exit(main())
