"""Tables and figures of the paper, each by one command."""

from localign.options.reproduce import ReproduceConfig
from localign.reproduce.run import run_reproduce
from localign.reproduce.targets import TARGETS

__all__ = ["TARGETS", "ReproduceConfig", "run_reproduce"]
