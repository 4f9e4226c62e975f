"""The one exception that means "the input is at fault"."""


class InputError(Exception):
    """The user's input is at fault: a config, a path, an image.

    The message is what the user reads: one line a problem, which names the file or key, what was found,
    what is accepted, and the remedy. It is printed without a traceback and the run exits with status 2.
    Every other exception is a bug and keeps its traceback.
    """


class OutOfMemory(InputError):  # noqa: N818 - as in PyTorch
    """There is no room for an image on this machine; another one may have it, so the image is not broken."""
