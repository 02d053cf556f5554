"""Commands that derive weight files from others: splitting, joining, merging, converting; no model is built."""
