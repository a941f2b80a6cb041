"""The losses that train: their names, and their titles in tables and pictures."""

LINEAR = "linear"  # computed in the output layer; the model returns no logits
TITLES = {"reference": "reference", "ours": "ours", LINEAR: "ours, no logits"}
