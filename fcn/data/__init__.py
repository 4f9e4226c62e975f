"""Data: from files to padded batches on the device.

What a sample looks like follows from the seed, the epoch and the sample; it must never depend on which process or
worker loads it.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    cache="CachedDataset with_cache",
    datasets="SegmentationDataset build_dataset check_sizes classes_and_format",
    identity="split_identity",
    images="decode is_image open_image read_pixels size_of walk_images",
    inspection="SplitReport inspect_split median_frequency_weights odd_files repeated_images",
    labels="IGNORE_INDEX Classes voc_palette",
    layouts="LAYOUTS mask_suffix",
    loaders="Batch EvalBatches LabelCounts RankBatches TrainingBatch device_batches",
    masks="MaskFormat index_format",
    samplers="EvalSampler GlobalBatchSampler RankBatch SampleRef",
    transforms="EvalTransform TrainTransform to_input",
    workers="PREFETCHED Patience batch_loader require_shared_memory",
)
