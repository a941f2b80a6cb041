"""`python -m bench linear`: the loss of hidden states and an output layer, beside every peer."""
