"""The formulas of class activation maps, where a layer's cells lie, and how a map becomes a picture or boxes."""
