"""Weight files as names, shapes and bytes: headers, key maps, LoRA formats, streaming. No model is built here."""
