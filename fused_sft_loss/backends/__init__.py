"""The ways of running the row kernels; ``contract.py`` says what a backend is."""
