"""Alternative texts and captions of the page's figures."""

from __future__ import annotations

from collections.abc import Sequence

Words = tuple[str, str]
"""Alternative text, caption."""

RECALL = (
    "Macro recall at threshold 0.5: the share of a class's patches (local) or images (global) that a head on the "
    "frozen backbone finds, averaged over classes. Differences are in points."
)


def features(joint: bool) -> Words:
    """Texts of the maps of patch features; ``joint`` says whether both models share one basis."""
    basis = (
        "There is one PCA per backbone, over all patches of these images: colours are comparable along a row, not "
        "between rows."
    )
    if joint:
        basis = (
            "Both backbones share one basis and one range of colours, each centred on its own mean: colours are "
            "comparable between rows, too."
        )
    return (
        "Images and maps of their patch features before and after alignment, coloured by principal components.",
        f"Patch tokens of the last layer; red, green and blue are their first three principal components. {basis}",
    )


def heads(until_converged: bool) -> Words:
    """Texts of the heads' loss curves."""
    use = "The curves choose nothing: heads are evaluated after their last step."
    if until_converged:
        use = (
            "The validation loss is of training images that no head was trained on. It ends a head's training, and the "
            "weights with the lowest loss are evaluated."
        )
    return (
        "Training and validation loss of each probing head.",
        "Loss of the probing heads while they train on frozen features. Lines are means over seeds, bands the range of "
        f"the validation loss over seeds. {use}",
    )


def predictions(class_names: Sequence[str]) -> Words:
    """Texts of the predictions per patch."""
    return (
        f"Images, true patch labels ({', '.join(class_names[:12])}), and predictions of both models.",
        "Predictions of a local-task head. A cell shows the classes with a probability above 0.5 as colours and signs: "
        "several colours are stripes, paler means a lower probability, and an empty cell means no class. A red outline "
        "marks a patch whose set of classes differs from the true set, which is every class of any of its pixels. A "
        "blue disc marks a patch that the second model fixes, a red cross one that it breaks.",
    )


def reconstructions(loss: str, one_token: bool) -> Words:
    """Texts of the reconstructions.

    Args:
        loss: The alignment's loss.
        one_token: Whether the target is the class token; otherwise it is patch tokens.
    """
    caption = (
        "Feature reconstruction. The teacher sees an image with hidden patches (struck through, in the mean colour). "
        "The student sees the whole image, its embeddings of the hidden patches are removed, and it reconstructs the "
        "teacher's tokens. "
    )
    if one_token:
        caption += (
            "The target is the class token: a cell is one of its channels, orange below and violet above the channel's "
            "mean over these views. Error: squared error over the variance of the teacher's class tokens; 0 is "
            "perfect, 1 is no better than their mean."
        )
    else:
        caption += (
            "One PCA, fitted to the teacher's tokens, colours all tokens. Error: squared error over the variance of "
            "the teacher's patch tokens; 0 is perfect, 1 is no better than their mean."
        )
    if loss == "cosine":
        caption += (
            " This run's cosine loss leaves the length of tokens free: read colours and errors with care."
        )
    return (
        "For each mask: the image as the teacher sees it, the teacher's tokens, and the student's reconstruction.",
        caption,
    )


def training(run_name: str) -> Words:
    """Texts of the training curves; ``run_name`` names one of several alignments, and is empty for a single one."""
    which = f" This is {run_name}, the first of the alignment runs." if run_name else ""
    return (
        "Curves of training and validation loss, gradient norm, learning rate and attention logits.",
        f"Alignment over optimizer steps.{which} Training values are means since the last logged step.",
    )
