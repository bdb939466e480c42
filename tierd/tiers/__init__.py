"""The media of the tiers: segments in memory and in files, and the engines that move their bytes."""
