"""What proves GPU code on a machine without a GPU; README.md says which part proves what."""
