"""Where the files of components come from, and what identifies them."""
