"""Train semantic-segmentation networks on any number of processes, with the same numbers."""
