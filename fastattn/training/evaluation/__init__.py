"""What a trained model is worth: figures on data that it has not seen."""
