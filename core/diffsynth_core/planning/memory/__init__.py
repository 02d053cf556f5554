"""Memory, disk and operations of a run, from sizes alone, and what makes it fit."""
