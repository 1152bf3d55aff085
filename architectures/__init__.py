"""Architectures that torchvision does not have."""
