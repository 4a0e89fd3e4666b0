"""The one training loop: distribution, precision, optimiser and schedule, checkpoint, logging."""

from localign.engine.loop import train
from localign.engine.run_folder import Outcome
from localign.engine.task import BatchPlan, StepResult, Task
from localign.options.train import TrainConfig

__all__ = ["BatchPlan", "Outcome", "StepResult", "Task", "TrainConfig", "train"]
