"""Settings: their declaration, recipes, and how flags, files and defaults become one set of parameters."""
