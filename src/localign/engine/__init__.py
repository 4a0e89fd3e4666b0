"""The training loop: distribution, precision, optimiser and schedule, checkpoint, logging.

Everything that is trained goes through this loop as a :class:`Task`, except the probing heads: ``probing/training/``
has a second, small loop. It trains up to dozens of heads on one stream of frozen features, often once per backbone of
a command, and needs what this loop must not do. Each head's backward pass follows its own forward pass, so that only
one head's activations exist at a time. No gradient norm is taken over all heads, so that a head's result does not
depend on the heads beside it, to the bit. And there are no run folder and no checkpoints, since a training takes
minutes. It shares the ranks, the choice of precision, the cosine and the progress bars with this loop.
"""

from localign.engine.loop import train
from localign.engine.run_folder import Outcome
from localign.engine.task import BatchPlan, StepResult, Task
from localign.options.train import TrainConfig

__all__ = ["BatchPlan", "Outcome", "StepResult", "Task", "TrainConfig", "train"]
