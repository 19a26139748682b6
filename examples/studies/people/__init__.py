"""How much models that train for equal seconds remember of invented people in their training text."""
