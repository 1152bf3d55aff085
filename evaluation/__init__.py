"""Score predictions, with intervals; compare maps with lesions, lungs and chance; find what could fool a network."""
