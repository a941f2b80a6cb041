"""The backends: ways to run the row kernels. ``contract.py`` defines what a backend provides."""
