"""Test GPU code on a machine without a GPU; README.md says what each part proves."""
