"""What is kept and drawn of an evaluation, on one rank alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from fcn.evaluation.evaluate import Evaluation
from fcn.files import write_atomically
from fcn.tracking import Record, Sample, Scores, plots, scores_name


def show_scores(found: Evaluation, record: Record, folder: Path, worst: bool) -> Scores:
    """Write the confusion matrix, the scores of the images and the pictures of an evaluation into a run's directory.

    Args:
        record: what was recorded of the evaluation.
        worst: also draw the images with the lowest scores.
    """
    dataset, split = found.evaluator.dataset, found.evaluator.split
    classes = dataset.classes
    names = [dataset.name(index) for index in range(len(dataset))]
    images = [[name, None if math.isnan(score) else score] for name, score in zip(names, found.image_miou.tolist())]
    details = {"classes": classes.names, "palette": classes.palette, **found.counts()}
    write_atomically(folder / scores_name(split), json.dumps({**record, **details, "image_miou": images}) + "\n")
    samples = []
    if found.evaluator.config.eval.pictures:
        samples = draw_scores(found, record["step"], folder / "pictures", worst)
    return Scores(record, classes, found.matrix.counts.numpy(), samples)


def draw_scores(found: Evaluation, step: int, folder: Path, worst: bool = True) -> list[Sample]:
    """Draw SPLIT_confusion.png and, of `eval.pictures` images each, SPLIT_STEP.png and SPLIT_worst.png.

    Returns:
        The images of SPLIT_STEP.png, which are the same ones every time.
    """
    dataset, split = found.evaluator.dataset, found.evaluator.split
    classes, count = dataset.classes, min(found.evaluator.config.eval.pictures, len(dataset))
    plots.save(plots.confusion(found.matrix.counts.numpy(), classes), folder / f"{split}_confusion.png")
    if not count:
        return []
    # Spread over the split: neighbours are often frames of one video.
    samples = label_images(found, [i * len(dataset) // count for i in range(count)])
    plots.save(plots.panels(samples, classes), folder / f"{split}_{step:08d}.png")
    if worst and (lowest := found.worst(count)):
        plots.save(plots.panels(label_images(found, lowest), classes), folder / f"{split}_worst.png")
    return samples


@torch.inference_mode()
def label_images(found: Evaluation, indices: Iterable[int]) -> list[Sample]:
    """Predict images of the split again, captioned with their names and scores."""
    evaluator, model, samples = found.evaluator, found.evaluator.model, []
    was_training = model.training
    model.eval()
    try:
        for index in indices:
            image, mask = evaluator.transform(*evaluator.dataset.read(index))
            classes = evaluator.predict(torch.from_numpy(np.array(image))[None], (mask.height, mask.width))[0]
            miou = found.image_miou[index]
            caption = evaluator.dataset.name(index) + ("" if miou.isnan() else f"   mIoU {miou:.4f}")
            samples.append(Sample(np.asarray(image), np.asarray(mask), classes.cpu().numpy(), caption))
    finally:  # rank 0 alone in evaluation mode would leave the other ranks waiting for its statistics
        model.train(was_training)
    return samples
