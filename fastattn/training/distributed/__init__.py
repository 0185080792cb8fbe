"""Training on many devices: torch's own engines, composed in one DeviceMesh by four numbers."""
