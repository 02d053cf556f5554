"""Wan: a diffusion transformer for clips, with UMT5 as its text encoder and CLIP for a first image."""
