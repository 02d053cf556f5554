"""FLUX.2 klein: a diffusion transformer of double and single streams with Qwen3 as its text encoder."""
