"""From files to batches: sources, transforms, the sampler and the tf.data pipeline."""
