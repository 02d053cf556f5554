"""From metadata to batches: reading, sizing, ordering, caching. Families define what samples mean."""
