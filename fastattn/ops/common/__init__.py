"""Shared by the ops: autocast, transforms, launching."""
