"""What the tables of several families are made of."""
