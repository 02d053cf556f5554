"""When an image or video has too few pixels for what it is trained at."""

MAX_UPSCALE = 1.5
"""Files that are scaled up by more than this factor are named: what they lack in detail is learned as blur."""
MIN_AREA_SHARE = 0.125
"""Files of a smaller share of the area that the model is usually trained at (some 35 % of its sides) are named."""
