"""The generated parts of the README and of docs/."""
