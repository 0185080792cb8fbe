"""How good a trained model is: figures on data that it has not seen."""
