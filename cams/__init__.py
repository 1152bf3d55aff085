"""The formulas of class activation maps, the places of a layer's cells, and pictures and boxes of maps."""
