"""What the HTML pages that this program writes have in common: one file each, which asks for no other."""
