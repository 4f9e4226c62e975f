"""Models: the networks, layers that do not depend on the number of processes, and the arithmetic they run in.

A network must never know its loss, its data or its rank.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    build="MODELS build_model shapes_of",
    custom="Examined examine",
    layers="DoublingConv2d SampleKeys SingleValueError SyncBatchNorm2d SynchronisedSubclass convert_dropout "
    "convert_sync_batchnorm",
    precision="DTYPES Precision",
    sharded="convert_shards examine_shards",
)
