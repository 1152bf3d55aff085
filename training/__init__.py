"""Train a network: the loop, batches, objectives, checkpoints, devices, processes, frozen features."""
