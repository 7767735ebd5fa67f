"""The losses as objects in the idiom of a framework: `unilabel.layers.torch`, `unilabel.layers.keras`."""
