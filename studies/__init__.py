"""What may stand in a study file, and how a file becomes a table of X-rays."""
