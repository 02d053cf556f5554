"""Plans, estimates, reports and lists as lines of text."""
