"""What a run writes and where: its folder, when it saves, trackers and copies elsewhere."""
