"""The demo: a 4-bit language model gets better at a real task, from one command and without a download."""
