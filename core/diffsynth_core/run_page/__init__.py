"""What a run shows of itself: read from its folder alone, as a page for a browser and as text for a terminal."""
