"""Images: read from files, augmented, and put together to batches that are functions of (seed, epoch, step)."""
