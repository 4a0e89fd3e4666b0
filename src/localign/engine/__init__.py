"""The one training loop: distribution, precision, optimiser and schedule, checkpoint, logging."""

from localign.engine.config import TrainConfig
from localign.engine.loop import train
from localign.engine.run_folder import Outcome
from localign.engine.task import BatchPlan, StepResult, Task

__all__ = ["BatchPlan", "Outcome", "StepResult", "Task", "TrainConfig", "train"]
