"""Signs that a run learns nothing useful, from counts that it has anyway: each is said once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fcn.config import Config
from fcn.data import IGNORE_INDEX, Classes, LabelCounts

ENOUGH_EPOCHS, ENOUGH_IMAGES, ENOUGH_STEPS = 3, 256, 300
"""When labels are judged: after so many epochs, because a crop may miss a rare class, and images; in long epochs also
after so many steps, which say nothing about a rare class yet. A shorter run is judged at its end."""
TRAINED_STEPS = 100
"""Before so many steps a network may predict anything."""


class SanityCheck:
    """Watches the labels that a run trains on, and what its network predicts; every start of a run begins anew.

    Args:
        images: of the training split.
    """

    def __init__(self, config: Config, classes: Classes, images: int) -> None:
        self.names, self.batch_size = classes.names, config.train.batch_size
        self.epochs = ENOUGH_EPOCHS * images
        self.enough = max(self.epochs, ENOUGH_IMAGES)
        ignored = config.loss.ignore_index
        self.ignored_class = ignored if ignored < len(classes) else None
        own = ":" in config.data.name
        self.chosen = own or ignored != IGNORE_INDEX or "ignore" in (config.data.values or {})
        """Whether the user has said what is ignored, so that much of it is meant."""
        self.remedy = "look at the data set with python -m fcn check"
        if config.data.name == "folder":
            self.remedy = "say in data.values what each value of a mask means, and count them with python -m fcn check"
        self.pixels = np.zeros(256, np.int64)
        self.seen = 0
        """Images."""
        self._labels_judged = self._predictions_judged = False
        self._constant = 0
        """Evaluations in a row with a single predicted class."""

    def step(self, counts: LabelCounts, last: bool) -> str | None:
        """Count the labels of a global batch; returns what is wrong with those so far, once there are enough, or after
        the last step."""
        self.seen += self.batch_size
        if self._labels_judged:
            return None
        self.pixels += counts.pixels
        whole = self.seen >= (self.epochs if last else self.enough)
        if not whole and self.seen < ENOUGH_STEPS * self.batch_size:
            return None
        finding = self._judge_labels(whole)
        self._labels_judged = whole or bool(finding)
        return finding

    def _judge_labels(self, whole: bool) -> str | None:
        wanted = [label for label in range(len(self.names)) if label != self.ignored_class]
        missing = [label for label in wanted if not self.pixels[label]]
        ignored = self.pixels[IGNORE_INDEX] / max(1, self.pixels.sum())
        found = []
        if len(missing) == len(wanted):
            found.append("no pixel is labelled")
        elif len(missing) == len(wanted) - 1 > 0:
            (only,) = set(wanted) - set(missing)
            found.append(f"every labelled pixel is {self.names[only]!r}")
        elif missing and whole:
            shown = ", ".join(repr(self.names[label]) for label in missing[:4])
            shown += f" or {len(missing) - 4} more" if len(missing) > 4 else ""
            found.append(f"no pixel is labelled {shown}")
        if (ignored > 0.5 and not self.chosen) or (found and ignored > 0.01):
            found.append(f"{ignored:.0%} of the pixels are ignored")
        if not found:
            return None
        return f"data: in the {self.seen:,} images so far, {' and '.join(found)}; if that is not meant, {self.remedy}"

    def evaluation(self, counts: Sequence[Sequence[int]], split: str, last: bool) -> str | None:
        """Look at a confusion matrix (C, C), labels down; says if the network predicts one class for everything.

        At the start of a run that is common, so it has to happen twice, or at the end.
        """
        matrix = np.asarray(counts)
        predicted = np.flatnonzero(matrix.sum(0))
        self._constant = self._constant + 1 if len(predicted) == 1 < np.count_nonzero(matrix.sum(1)) else 0
        trained = self.seen >= max(self.enough, TRAINED_STEPS * self.batch_size)
        if self._predictions_judged or not trained or not (self._constant > 1 or (self._constant and last)):
            return None
        self._predictions_judged = True
        return (
            f"the network predicts {self.names[predicted[0]]!r} for every pixel of '{split}'; try another optim.lr, or "
            f"for rare classes loss.weights or loss.add={{dice: 1}}, and look at the labels with python -m fcn check"
        )
