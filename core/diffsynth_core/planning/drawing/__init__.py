"""What is drawn, by `generate` and by the previews of a run."""
