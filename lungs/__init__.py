"""The lungs in an X-ray: find them, and mask the rest."""
