"""From metadata to batches: reading, sizing, ordering, caching. What the samples mean is the family's business."""
