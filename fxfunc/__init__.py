"""Composable function transforms for PyTorch as passes over FX graphs."""
