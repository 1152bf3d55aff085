"""The settings of study files, and the way from a file to a table of X-rays."""
