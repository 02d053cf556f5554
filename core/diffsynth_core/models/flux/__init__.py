"""FLUX.1: a transformer of double- and single-stream blocks, with CLIP and T5 as its text encoders."""
