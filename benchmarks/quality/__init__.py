"""How much each method learns, and in what time."""
