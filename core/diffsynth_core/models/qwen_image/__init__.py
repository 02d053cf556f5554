"""Qwen-Image: a double-stream diffusion transformer with Qwen2.5-VL as its text encoder."""
