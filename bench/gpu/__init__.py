"""`python -m bench gpu`: every check and every measurement of a GPU, in one command."""
