"""Training of probing heads: all heads, tasks and seeds together, over one stream of frozen features.

Heads share only the batches. AdamW updates every parameter element independently, no gradient norm is taken, and the
decision to stop a head depends on its own losses. Therefore a head trained together with others equals the same head
trained alone, bit for bit. The seed decides the initial weights of a head. The order of the samples is the same for all
seeds and all runs, so that seeds share each batch's features, and a seed's results do not depend on the other seeds.
"""

from localign.probing.training.loop import ORDER_SEED, TrainedHeads, held_out_rows, train_heads
from localign.probing.training.losses import SeededHead, chunks, head_loss
from localign.probing.training.schedule import learning_rate

__all__ = [
    "ORDER_SEED",
    "SeededHead",
    "TrainedHeads",
    "chunks",
    "head_loss",
    "held_out_rows",
    "learning_rate",
    "train_heads",
]
