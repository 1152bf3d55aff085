"""From predictions to numbers with intervals; maps against lesions, lungs and chance; what could fool a network."""
