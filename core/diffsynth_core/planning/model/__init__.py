"""What a run loads: components, the files of each, and how their weights are kept."""
