"""Generating images and clips with what trains: the plan, encoding, sampling, LoRAs, files and grids."""
