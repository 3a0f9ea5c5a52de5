"""How much methods learn, and in what time."""
