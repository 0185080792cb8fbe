"""What the ops share: autocast, transforms, launching."""
