"""What the page says about its figures: for each, alternative text and a caption."""

from __future__ import annotations

from collections.abc import Sequence

Words = tuple[str, str]
"""Alternative text, caption."""

RECALL = (
    "Macro recall at threshold 0.5: the mean over classes of the share of their patches (local) or images "
    "(global) that a head trained on the frozen backbone finds. Differences are in points."
)

FEATURES: Words = (
    "Images and maps of their patch features before and after alignment, coloured by principal components.",
    "Patch tokens of the last layer; red, green and blue are their first three principal components. One "
    "PCA per backbone over all patches of the images shown, so colours compare along a row, not between "
    "rows.",
)

HEADS: Words = (
    "Training and validation loss of each probing head.",
    "Loss of the probing heads while they train on frozen features. Lines are means over seeds, bands the "
    "range of the validation loss over seeds. Nothing is chosen by these curves: heads are judged as their "
    "last step left them.",
)


def predictions(class_names: Sequence[str]) -> Words:
    """Of the per-patch predictions."""
    return (
        f"Images, true patch labels ({', '.join(class_names[:12])}), and predictions of both models.",
        "What a local-task head reads from each patch. A cell shows the classes with a probability above "
        "0.5, as colours and signs; several colours share a cell in stripes, paler means less sure, and an "
        "empty cell means no class. Red outlines mark patches whose set of classes is not exactly the true "
        "one; a patch's truth is every class that any of its pixels has.",
    )


def reconstructions(loss: str, one_token: bool) -> Words:
    """Of the reconstructions, for a run with this loss whose teacher gives patch tokens, or the class token."""
    caption = (
        "Feature reconstruction. The teacher sees an image with patches hidden (struck through, in the mean "
        "colour). The student sees the whole image, loses its embeddings of the hidden patches, and "
        "reconstructs what the teacher gives. "
    )
    if one_token:
        caption += (
            "Here that is the class token: a cell is one of its channels, orange below and violet above its "
            "mean over these views. Error: squared error over the variance of the teacher's class tokens; "
            "0 is perfect, 1 no better than their mean."
        )
    else:
        caption += (
            "All tokens are coloured by one PCA, fitted to the teacher's. Error: squared error over the "
            "variance of the teacher's patch tokens; 0 is perfect, 1 no better than their mean."
        )
    if loss == "cosine":
        caption += (
            " This run's loss was the cosine, which leaves lengths free: read colours and errors with care."
        )
    return (
        "For each mask: what the teacher sees, what it gives, and the student's reconstruction of it.",
        caption,
    )


def training(run_name: str) -> Words:
    """Of the training curves; ``run_name`` is empty for a lone run."""
    which = f" This is {run_name}, the first of the alignment runs." if run_name else ""
    return (
        "Curves of training and validation loss, gradient norm, learning rate and attention logits.",
        f"Alignment over optimizer steps.{which} Training values are means since the last logged step.",
    )
