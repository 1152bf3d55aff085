"""A trained network: its card, loading it, and what it says of one X-ray or of very many."""
