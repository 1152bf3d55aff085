"""Trained networks: their cards, how they are loaded, and their answers to one X-ray or to very many."""
