"""Model families. What the engine knows of a family it asks through `interface` (facts) and `family` (verbs)."""
