"""Thresholds below which an image or video has too few pixels for its training size."""

MAX_UPSCALE = 1.5
"""Maximum upscaling without a warning: the missing detail is learned as blur."""
MIN_AREA_SHARE = 0.125
"""Minimum fraction of the model's usual training area without a warning (about 35 % of its sides)."""
