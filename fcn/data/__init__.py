"""From files to batches: labels and classes, data sets, transforms, samplers, loaders."""
