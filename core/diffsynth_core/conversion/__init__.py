"""Weight files made of others: checkpoints taken apart, LoRAs merged, names translated; no model is built."""
