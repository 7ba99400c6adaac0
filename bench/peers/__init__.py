"""What ours is timed beside, each written or called in the way it is fastest."""
