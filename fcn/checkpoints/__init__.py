"""Checkpoints: one verified file a save, the folder that keeps them, pretrained weights.

A file from here may be foreign: it is data, and reading it must never run code.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    folder="ALTERED checkpoint_path find_newest list_checkpoints quarantine",
    format="load_checkpoint save_checkpoint",
    pretrained="load_pretrained",
    saver="BackgroundSaver",
)
