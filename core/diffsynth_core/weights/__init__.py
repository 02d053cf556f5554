"""Weight files as names, shapes and bytes: headers, key dialects, streaming. No model is built here."""
