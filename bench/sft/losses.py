"""The losses that train: their names, and their titles in tables and pictures."""

LINEAR = "linear"  # computed in the output layer; the model returns no logits
TITLES = {"reference": "reference", "ours": "ours", LINEAR: "ours, no logits"}

# `bench agreement` compares them with two further runs of the reference.
IN_FP32 = "fp32"  # weights, activations and logits in fp32
REVERSED = "reversed"  # the rows of a batch in reverse order: the same sums in another order
EVERY_TITLE = {
    IN_FP32: "reference, fp32 model",
    REVERSED: "reference, rows reversed",
    **TITLES,
}
