"""What a run trains, and how its weights are updated."""
