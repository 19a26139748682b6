"""How many invented people, told among real text, models of equal seconds of training remember."""
