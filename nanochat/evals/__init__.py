"""Evaluations: bits per byte, in-context tasks of an evaluation bundle, and chat tasks."""
